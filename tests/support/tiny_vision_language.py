"""Tiny random checkpoints of models that see images and write text, with tokenizers.

Each is written by transformers itself, which is also what results are compared with. No two sizes
are equal, so that a mixed-up dimension shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY: Final = 101
PAD, BOS, EOS, IMAGE = 0, 1, 2, 98
LENGTH: Final = 4
"""Features of an image."""
SIZE: Final = 12
TEXT: Final[Mapping[str, Any]] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_VISION: Final[Mapping[str, Any]] = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "image_size": SIZE,
    "patch_size": 6,
}
_CONNECTED: Final[Mapping[str, Any]] = {
    "vision_config": {**_VISION, "patch_size": 3, "num_hidden_layers": 2},
    "image_token_id": IMAGE,
    "scale_factor": 2,
}


def _llava(**changes: Any) -> Any:
    vision = {**_VISION, "model_type": "clip_vision_model"}
    given = {"vision_config": vision, "text_config": dict(TEXT), "image_token_index": IMAGE}
    return transformers.LlavaConfig(**{**given, **changes})


CONFIGS: Final[Mapping[str, Any]] = {
    "llava": _llava,
    "llava-siglip": lambda: _llava(
        vision_config={**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**TEXT, "model_type": "qwen2", "tie_word_embeddings": True},
        vision_feature_layer=[1, -1],
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    ),
    "smolvlm": lambda: transformers.SmolVLMConfig(text_config=dict(TEXT), **_CONNECTED),
    "idefics3": lambda: transformers.Idefics3Config(text_config=dict(TEXT), **_CONNECTED),
}
CLASSES: Final[Mapping[str, Any]] = {
    "llava": transformers.LlavaForConditionalGeneration,
    "llava-siglip": transformers.LlavaForConditionalGeneration,
    "smolvlm": transformers.SmolVLMForConditionalGeneration,
    "idefics3": transformers.Idefics3ForConditionalGeneration,
}
NESTED: Final = ("smolvlm", "idefics3")
"""Those that take images by row, [B, images, channels, height, width]."""


def tiny_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """Return transformers' module of a family, its weights moved from where they begin."""
    torch.manual_seed(seed)
    model = CLASSES[kind](CONFIGS[kind](**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.2))
    return model


def tiny_folder(folder: Path, kind: str, **changes: Any) -> Path:
    """Write a checkpoint with its tokenizer; ``changes`` go into its config."""
    tiny_model(kind, **changes).save_pretrained(folder)
    write_words(folder)
    return folder


def write_words(folder: Path) -> None:
    """Write a tokenizer whose word ``w7`` is token 7, and ``<image>`` stands for an image."""
    special = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<image>": IMAGE}
    words = special | {f"w{n}": n for n in range(VOCABULARY) if n not in special.values()}
    backend = Tokenizer(models.WordLevel(words, "w4"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(special))
    backend.save(str(folder / "tokenizer.json"))
