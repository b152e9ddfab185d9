"""Transformer definitions in plain PyTorch, and how checkpoints map onto them."""

from llmopt.models.config import DecoderConfig, EncoderConfig, LayerConfig
from llmopt.models.definition import Definition, define
from llmopt.models.recipe import Recipe

__all__ = [
    "DecoderConfig",
    "Definition",
    "EncoderConfig",
    "LayerConfig",
    "Recipe",
    "define",
]
