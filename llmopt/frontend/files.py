"""The files that an artifact ships beside its model: tokenizer, chat, generation defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmopt.bundle.manifest import ModelFacts
from llmopt.frontend.chat import compile_chat
from llmopt.frontend.tokenizer import chat_template, special_tokens, tokenizer_files

CHAT = "chat.json"
GENERATION = "generation_config.json"


def shipped_files(
    path: Path, generation: Mapping[str, Any], model: ModelFacts
) -> tuple[dict[str, bytes], list[str]]:
    """Return file name to content, and what a user should know about what is absent."""
    notes: list[str] = []
    files = dict(tokenizer_files(path))
    if not files:
        notes.append("no tokenizer was found: the artifact takes token ids, not text")
    template = chat_template(files)
    if template is not None:
        chat, reason = compile_chat(template, special_tokens(files))
        if chat is None:
            notes.append(f"chat template left out: {reason}")
        else:
            files[CHAT] = chat.to_json().encode()
    settings = dict(generation) or {
        "bos_token_id": model.bos,
        "eos_token_id": list(model.eos),
        "pad_token_id": model.pad,
    }
    if model.cache != "none":
        files[GENERATION] = (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()
    return files, notes
