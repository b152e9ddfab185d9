"""What is answered: OpenAI's JSON, whole or piece by piece."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from llmopt.interface.arrays import Array
from llmopt.runtime.serving.work import Rows, Text

DONE: Final = b"data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to one request to generate.

    Args:
        model: The model's name.
        chat: Whether it is the next message of a conversation.
        rows: The prompts.
        usage: Whether a stream ends with how many tokens it took.
    """

    model: str
    chat: bool
    rows: Rows
    usage: bool
    identity: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def complete(self, pieces: Sequence[Text]) -> dict[str, Any]:
        """Return the answer in one object."""
        texts = [""] * len(self.rows)
        for piece in pieces:
            texts[piece.row] += piece.text
        ends = [piece for piece in pieces if piece.reason]
        choices = [self._choice(end, texts[end.row]) for end in ends]
        kind = "chat.completion" if self.chat else "text_completion"
        return self._object(kind, choices) | {"usage": self._usage(pieces)}

    def beginning(self) -> Iterator[bytes]:
        """Yield what a stream begins with."""
        if self.chat:
            delta = {"role": "assistant", "content": ""}
            yield self._event([self._changed(Text(0, "", 0), delta)])

    def part(self, piece: Text) -> Iterator[bytes]:
        """Yield one piece of a stream; none where it brings nothing."""
        if piece.text:
            going = Text(piece.row, piece.text, piece.tokens)
            yield self._event([self._changed(going, {"content": piece.text})])
        if piece.reason:
            ending = Text(piece.row, "", piece.tokens, piece.reason)
            yield self._event([self._changed(ending, {})])

    def end(self, pieces: Sequence[Text]) -> Iterator[bytes]:
        """Yield what a stream ends with."""
        if self.usage:
            yield self._event([], usage=self._usage(pieces))
        yield DONE

    def _choice(self, end: Text, text: str) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": end.row, **said, "logprobs": None, "finish_reason": end.reason}

    def _changed(self, piece: Text, delta: Mapping[str, str]) -> dict[str, Any]:
        said = {"delta": delta} if self.chat else {"text": piece.text}
        return {"index": piece.row, **said, "logprobs": None, "finish_reason": piece.reason}

    def _event(self, choices: list[Any], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event(self._object(kind, choices) | more)

    def _object(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.identity}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _usage(self, pieces: Sequence[Text]) -> dict[str, int]:
        made = sum(piece.tokens for piece in pieces if piece.reason)
        return usage(self.rows) | {
            "completion_tokens": made,
            "total_tokens": sum(map(len, self.rows)) + made,
        }


def embeddings(model: str, rows: Rows, vectors: Array, *, as_base64: bool) -> dict[str, Any]:
    """Return the answer with embeddings [N, E]."""
    numbers = vectors.astype("<f4")
    listed = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(row.tobytes()).decode() if as_base64 else _list(row),
        }
        for i, row in enumerate(numbers)
    ]
    return {"object": "list", "data": listed, "model": model, "usage": usage(rows)}


def usage(rows: Rows) -> dict[str, int]:
    """Return how many tokens the inputs have."""
    count = sum(map(len, rows))
    return {"prompt_tokens": count, "total_tokens": count}


def event(data: Mapping[str, Any]) -> bytes:
    """Return one server-sent event."""
    return f"data: {json.dumps(data)}\n\n".encode()


def _list(row: Array) -> list[float]:
    """Return numbers in as few digits as tell them from other float32.

    >>> import numpy as np
    >>> _list(np.array([0.1], np.float32))
    [0.1]
    """
    return [float(str(value)) for value in row]
