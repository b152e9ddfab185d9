"""Program: a model as llmopt sees it, its graphs and what they mean."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir


class Role(enum.StrEnum):
    """What a graph input or output means. The names are those of the artifact's manifest."""

    TOKENS = "tokens"  # input_ids [B, S]
    MASK = "mask"  # attention_mask [B, T]: 1 where a token is, 0 where padding is
    POSITIONS = "positions"  # position_ids [B, S]
    TOKEN_TYPES = "token_types"  # token_type_ids [B, S]
    PAST_KEY = "past_key"  # past_key_values.{layer}.key [B, G, P, D]
    PAST_VALUE = "past_value"
    PRESENT_KEY = "present_key"  # present.{layer}.key [B, G, T, D]
    PRESENT_VALUE = "present_value"
    LOGITS_TO_KEEP = "logits_to_keep"  # an overridable initializer: 1 by default, 0 for all
    LOGITS = "logits"  # [B, K, V]
    HIDDEN = "hidden"  # last_hidden_state [B, S, E]
    EMBEDDING = "embedding"  # sentence_embedding [B, E]
    OTHER = "other"


@dataclass(frozen=True)
class Port:
    """One input or output of a Program.

    Args:
        name: The graph value's name.
        role: What it means.
        dtype: Element type as numpy names it.
        shape: Sizes; a string is a symbolic dimension.
        layer: The layer, for a cache.
    """

    name: str
    role: Role
    dtype: str
    shape: tuple[int | str, ...]
    layer: int | None = None


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a Program, in graph order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def find(self, role: Role) -> Port | None:
        """Return the first input, else output, that has ``role``."""
        return next((p for p in (*self.inputs, *self.outputs) if p.role is role), None)

    @property
    def has_cache(self) -> bool:
        """Whether keys and values of past tokens go in and come out."""
        return self.find(Role.PAST_KEY) is not None


@dataclass(frozen=True)
class Facts:
    """What is known about a model beside its graph.

    Args:
        task: ``"generate"``, ``"embed"``, ``"encode"`` or ``"raw"``.
        family: The architecture's name, or ``"custom"``.
        source: ``{"name", "kind", "digest"}`` of where it came from.
        model: Heads, widths, limits and special tokens, as the manifest's ``model`` shows them.
        expected: How many of each fusible thing the source has, counted from its config or its
            module tree and never by a pass: ``{"attention": 30, "norm": 61, "rotary": 30}``.
        max_length: The most tokens, past and new, that one sequence may have.
        files: Tokenizer, chat and generation files to ship: name → content.
    """

    task: str
    family: str = "custom"
    source: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, int] = field(default_factory=dict)
    max_length: int = 512
    files: Mapping[str, bytes] = field(default_factory=dict)


class Program:
    """A model on its way from source to artifact: passes edit it in place.

    Args:
        model: The graph, standard ONNX operators of opset ``dialect.OPSET``.
        signature: What its inputs and outputs mean.
        facts: What else is known.
    """

    def __init__(self, model: ir.Model, signature: Signature, facts: Facts) -> None:
        self.components: dict[str, ir.Model] = {"model": model}
        self.signature = signature
        self.facts = facts

    @property
    def model(self) -> ir.Model:
        """The one component of a decoder-only or encoder-only model."""
        return self.components["model"]

    @property
    def graph(self) -> ir.Graph:
        """The graph of ``model``."""
        return self.model.graph

    def learn(self, **facts: Any) -> None:
        """Replace some facts."""
        self.facts = replace(self.facts, **facts)

    def input(self, role: Role, layer: int | None = None) -> ir.Value | None:
        """Return the graph input of ``role`` (and ``layer``), if there is one."""
        return _value(self.graph.inputs, self.signature.inputs, role, layer)

    def output(self, role: Role, layer: int | None = None) -> ir.Value | None:
        """Return the graph output of ``role`` (and ``layer``), if there is one."""
        return _value(self.graph.outputs, self.signature.outputs, role, layer)


def _value(
    values: Iterable[ir.Value], ports: Iterable[Port], role: Role, layer: int | None
) -> ir.Value | None:
    names = {p.name for p in ports if p.role is role and layer in (None, p.layer)}
    return next((value for value in values if value.name in names), None)
