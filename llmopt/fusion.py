"""How many attentions, norms and rotary embeddings a source has, and how many were fused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from llmopt.errors import FusionError, UnknownNameError, UsageError
from llmopt.ir import graph as g
from llmopt.ir.attention import AttentionOp
from llmopt.ir.program import Program
from llmopt.passes.pipeline import Ran

KINDS: Mapping[str, tuple[str, ...]] = {
    "attention": ("Attention",),
    "norm": ("RMSNormalization", "LayerNormalization"),
    "activation": ("Gelu", "Swish", "Relu"),
    "rotary": ("RotaryEmbedding",),
}


@dataclass(frozen=True)
class FusionCount:
    """One kind of fusion.

    Args:
        expected: Count in the source, from its config or module tree; None if unknown.
        fused: Count in the Program.
        misses: ``node: reason`` for each node that a pass declined.
    """

    expected: int | None
    fused: int
    misses: tuple[str, ...] = ()


def fusion_report(program: Program, ran: Iterable[Ran]) -> dict[str, FusionCount]:
    """Return expected and fused counts of each kind, for a Program in the dialect."""
    declined = [miss for each in ran for miss in each.missed]
    report = {}
    for kind in KINDS:
        expected = program.facts.expected.get(kind)
        fused = sum(_count(part, kind) for part in program.parts())
        misses = tuple(f"{m.node}: {m.reason}" for m in declined if m.kind == kind)
        if expected or fused:
            report[kind] = FusionCount(expected, fused, tuple(dict.fromkeys(misses)))
    return report


def _count(program: Program, kind: str) -> int:
    if kind == "rotary":  # a layer's rotary is fused when both its Q and its K go through it
        return sum(
            all(map(_rotated, AttentionOp.of(node).qkv[:2]))
            for node in g.nodes(program.graph, "Attention")
        )
    return len(g.nodes(program.graph, *KINDS[kind]))


_MOVEMENT: Final = frozenset(
    {"Cast", "Concat", "Expand", "Reshape", "ScatterND", "Slice", "Split", "Transpose", "Unsqueeze"}
)


def _rotated(value: ir.Value) -> bool:
    """Whether ``value``, or a part of it, is the output of a RotaryEmbedding."""
    stack, seen = [value], {value}
    while stack:
        node = stack.pop().producer()
        if g.is_op(node, "RotaryEmbedding"):
            return True
        if node is not None and g.is_op(node, *_MOVEMENT):
            above = [v for v in node.inputs if v is not None and v not in seen]
            seen.update(above)
            stack.extend(above)
    return False


def required_kinds(requirements: Sequence[str]) -> list[str]:
    """Return the kinds that must be fused everywhere, from ``"attention=all"`` and the like.

    Raises:
        UsageError: a requirement has another form.
        UnknownNameError: there is no such kind.
    """
    kinds = []
    for text in requirements:
        kind, _, amount = text.partition("=")
        if amount != "all":
            raise UsageError(f"--require {text!r}: write KIND=all")
        if kind not in KINDS:
            raise UnknownNameError("kind of fusion", kind, KINDS)
        kinds.append(kind)
    return kinds


def require(report: Mapping[str, FusionCount], requirements: Sequence[str]) -> None:
    """Raise unless every required kind was fused wherever the source has it.

    Args:
        report: Counts of each kind, from `fusion_report`.
        requirements: ``"attention=all"`` and the like.

    Raises:
        FusionError: a required kind was not fused everywhere.
    """
    for kind in required_kinds(requirements):
        fused = report.get(kind, FusionCount(None, 0))
        expected = fused.expected if fused.expected is not None else fused.fused
        if fused.fused < expected or (expected == 0 and kind == "attention"):
            raise FusionError(kind, expected, fused.fused, fused.misses)
