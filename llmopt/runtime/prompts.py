"""What can be asked: a text, a conversation, or several of either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from llmopt.errors import ArtifactError, UsageError
from llmopt.runtime.chat import ChatFormat

CHAT: Final = "chat.json"

Conversation = list[dict[str, str]]
"""``{"role": …, "content": …}`` for each message; the last one is to be answered."""

Prompt = str | Conversation


def is_one(prompt: object) -> bool:
    """Whether ``prompt`` is one prompt and not several.

    >>> is_one("Hello"), is_one([{"role": "user", "content": "Hello"}]), is_one(["Hello"])
    (True, True, False)
    """
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def render_chat(folder: Path, prompt: Prompt) -> str:
    """Return the text that asks an assistant, special tokens included.

    Args:
        folder: The artifact.
        prompt: A conversation, or what the user says in one of a single message.

    Raises:
        UsageError: The artifact has no chat format, or the conversation does not fit it.
        ArtifactError: Its chat format cannot be read.
    """
    path = folder / CHAT
    if not path.is_file():
        raise UsageError(
            f"{folder}: has no chat format ({CHAT}), because the model came without a chat "
            "template or with one that cannot be taken apart; prompt it without chat"
        )
    try:
        chat = ChatFormat.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(path, str(error)) from error
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return chat.render(messages)
    except KeyError as error:
        raise UsageError(f"a message has no {error}; it takes 'role' and 'content'") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
