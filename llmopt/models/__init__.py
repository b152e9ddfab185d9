"""Transformer definitions in plain PyTorch, and how checkpoints map onto them."""

from llmopt.models.config import DecoderConfig, EncoderConfig, EncoderDecoderConfig, LayerConfig
from llmopt.models.definition import Definition, define
from llmopt.models.recipe import Recipe

__all__ = [
    "DecoderConfig",
    "Definition",
    "EncoderConfig",
    "EncoderDecoderConfig",
    "LayerConfig",
    "Recipe",
    "define",
]
