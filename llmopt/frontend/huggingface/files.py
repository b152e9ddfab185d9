"""Files that an artifact ships with its model: tokenizer, chat, generation defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmopt.frontend.huggingface.chat import compile_chat
from llmopt.frontend.huggingface.tokenizer import (
    chat_template,
    special_tokens,
    tokenizer_files,
)
from llmopt.interface.facts import ModelFacts

CHAT = "chat.json"
GENERATION = "generation_config.json"


_LEGACY = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "decoder_start_token_id",
    "early_stopping",
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beams",
    "pad_token_id",
    "repetition_penalty",
    "suppress_tokens",
)


def legacy_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation defaults that older checkpoints have in config.json."""
    return {key: config[key] for key in _LEGACY if config.get(key) is not None}


def shipped_files(
    path: Path, generation: Mapping[str, Any], model: ModelFacts
) -> tuple[dict[str, bytes], list[str]]:
    """Return file name to content, and notes for the user on what is missing."""
    notes: list[str] = []
    files = dict(tokenizer_files(path))
    if not files:
        notes.append("no tokenizer: the artifact takes token ids, not text")
    template = chat_template(files)
    if template is not None:
        chat, reason = compile_chat(template, special_tokens(files))
        if chat is None:
            notes.append(f"chat template omitted: {reason}")
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
