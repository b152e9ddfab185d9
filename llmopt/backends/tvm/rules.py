"""Which rule writes an operator: kernels of ours compute some, TVM the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import onnx_ir as ir

from llmopt.backends.tvm import arithmetic, attention, linear, movement, norms
from llmopt.backends.tvm.lower_linear import DOMAIN
from llmopt.ir import graph as g
from llmopt.ir.attention import AttentionOp
from llmopt.ir.program import Program

if TYPE_CHECKING:
    from llmopt.backends.tvm.function import Function

Rule = Callable[["Function", ir.Node], Sequence[Any]]

OURS: Final[Mapping[tuple[str, str], Rule]] = {
    ("", "Attention"): attention.attention,
    ("", "Gather"): norms.gather,
    ("", "LayerNormalization"): norms.norm,
    ("", "RMSNormalization"): norms.norm,
    ("", "RotaryEmbedding"): norms.rotary,
    (DOMAIN, "CachedAttention"): attention.cached,
    (DOMAIN, "PackedAttention"): attention.packed,
    (DOMAIN, "Linear"): linear.linear,
    (DOMAIN, "GatherRows"): linear.gather_rows,
}
"""What kernels of ours compute, by domain and operator."""

_GENERAL: Final[Mapping[str, Rule]] = {**arithmetic.RULES, **movement.RULES}


def rule_of(node: ir.Node) -> Rule:
    """Return what writes a node that is not `unsupported`."""
    ours = OURS.get((node.domain, node.op_type))
    return ours if ours is not None else _GENERAL[node.op_type]


def unsupported(program: Program) -> list[str]:
    """Return every operator, or form of one, that no rule writes."""
    return [problem for node in program.graph for problem in _problems(node)]


def _problems(node: ir.Node) -> Iterator[str]:
    ours = (node.domain, node.op_type) in OURS
    if not ours and (node.domain or node.op_type not in _GENERAL):
        yield f"no kernel for {node.op_type} ({node.name!r})"
    if node.op_type == "RotaryEmbedding" and g.optional(node, 3) is None:
        yield f"RotaryEmbedding ({node.name!r}) has no position_ids"
    if node.op_type == "Attention" and AttentionOp.of(node).nonpad_kv_seqlen is not None:
        yield f"Attention ({node.name!r}) takes the lengths of padded keys"
