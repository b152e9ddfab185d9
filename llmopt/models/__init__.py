"""Transformer definitions in plain PyTorch, and how checkpoints map onto them."""

from llmopt.models.config import (
    DecoderConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    LayerConfig,
)
from llmopt.models.definition import FAMILIES, Definition, define
from llmopt.models.recipe import ParameterRecipe

__all__ = [
    "FAMILIES",
    "DecoderConfig",
    "Definition",
    "EncoderConfig",
    "EncoderDecoderConfig",
    "LayerConfig",
    "ParameterRecipe",
    "define",
]
