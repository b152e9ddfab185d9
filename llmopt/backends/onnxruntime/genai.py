"""What onnxruntime-genai needs to open an artifact: ``genai_config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from llmopt.ir.program import Program

FILE: Final = "genai_config.json"


def genai_config(
    program: Program, entry: str, providers: Mapping[str, Mapping[str, str]]
) -> bytes | None:
    """Return the configuration of a decoder with a cache, None for any other Program.

    The artifact's inputs and outputs carry the names that onnxruntime-genai expects, so the
    model type only selects its generic decoder. Vision-language models have a processor each,
    selected by model type, and get no configuration.

    Args:
        program: The decoder.
        entry: File name of the decoder.
        providers: Execution providers, each with its options; the CPU if none.
    """
    if not program.signature.has_cache or program.facts.task != "generate":
        return None
    if len(program.components) > 1:
        return None
    model = program.facts.model
    ends = list(model.eos)
    options = [{name: dict(settings)} for name, settings in providers.items()]
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": options},
        "filename": entry,
        "head_size": model.head_width,
        "hidden_size": model.hidden,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
    }
    config = {
        "model": {
            "bos_token_id": model.bos if model.bos is not None else 0,
            "context_length": model.max_length,
            "decoder": decoder,
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "pad_token_id": model.pad if model.pad is not None else (ends or [0])[0],
            "type": "llama",
            "vocab_size": model.vocabulary,
        },
        "search": {
            "do_sample": False,
            "max_length": model.max_length,
            "past_present_share_buffer": model.cache == "shared",
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
