"""Families of checkpoints: config parser, names of weights, and their layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from llmopt.models.config import (
    Activation,
    DecoderConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    LayerConfig,
)
from llmopt.models.recipe import Op
from llmopt.models.rope_config import refused

Fields = Mapping[str, Any]
Config = DecoderConfig | EncoderConfig | EncoderDecoderConfig

# gelu_new, gelu_fast and gelu_pytorch_tanh are one formula
ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class Weight:
    """The location of a module's parameters in a checkpoint.

    Args:
        path: Module in the checkpoint, ``{}`` for the layer; its parameters keep their names.
        op: Operation on its weight (and on nothing else).
        part: Rows of a fused projection: ``q`` ``k`` ``v`` ``gate`` ``up``; all if empty.
        rooted: Whether ``path`` starts at the root, not below the checkpoint's prefix.
        instead: Path in checkpoints that have nothing at ``path``; none if empty.
    """

    path: str
    op: Op = "copy"
    part: str = ""
    rooted: bool = False
    instead: str = ""


@dataclass(frozen=True)
class Family:
    """One row of the table of families.

    Args:
        parse: Function from a Hugging Face config to a definition's config.
        weights: Modules (and top-level parameters) of the definition to the checkpoint's;
            ``layers.{}`` is any layer.
        classes: Suffixes of the ``architectures`` that the definition computes.
    """

    parse: Callable[[Fields], Config]
    weights: Mapping[str, Weight]
    classes: Sequence[str]


def need(config: Fields, key: str) -> Any:
    """Return a required value of a config."""
    if config.get(key) is None:
        raise refused(config, f"config.json lacks {key!r}")
    return config[key]


def activation(config: Fields, key: str, default: str) -> Activation:
    """Return the activation that a config names, or that of its family."""
    name = str(config.get(key) or default)
    if name not in ACTIVATIONS:
        raise refused(config, f"activation {name!r} (known: {', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[name]


def rows(kind: LayerConfig, part: str) -> tuple[int, int] | None:
    """Return the rows of ``part`` in a fused projection: q, k, v or gate, up in that order."""
    query, shared = kind.heads * kind.head_width, kind.kv_heads * kind.head_width
    inner = kind.feed_forward
    return {
        "": None,
        "q": (0, query),
        "k": (query, query + shared),
        "v": (query + shared, query + 2 * shared),
        "gate": (0, inner),
        "up": (inner, 2 * inner),
    }[part]
