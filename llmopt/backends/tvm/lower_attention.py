"""Lower Attention to the operator that the kernels compute: norm, rotation, cache and all.

Rewrites::

    q, k, v = Split(qkv); q, k = RMSNormalization(q), RMSNormalization(k)    [QK norm, if any]
    q, k = RotaryEmbedding(q), RotaryEmbedding(k)                            [if any]
    y, present = Attention(q, k, v, past)
        into    y, present = CachedAttention(qkv, …, past)

    q, k, v = Split(qkv); y = Attention(q, k, v)
        into    y = PackedAttention(qkv)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import onnx_ir as ir
from typing_extensions import override

from llmopt.backends.tvm.lower_linear import DOMAIN
from llmopt.ir import graph as g
from llmopt.ir.attention import AttentionOp, kept
from llmopt.ir.landmarks import Landmark, is_landmark
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass

_KEPT: Final = ("heads", "groups", "causal", "window", "softcap", "scale")


@dataclass(frozen=True)
class LowerPackedAttention(Pass):
    """Lower Attention of projections of one value to one operator on the projections' row.

    Numerics: exact but for the order of sums.
    Scope: the graph. Leaves: Attention with a mask that is more than padding, or whose Q, K and V
    come from elsewhere; that is computed by products and a softmax.
    """

    name: ClassVar[str] = "lower-attention-tvm"
    lowers: ClassVar[bool] = True

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in g.nodes(program.graph, "Attention"):
            op = AttentionOp.of(node)
            found = _found(op)
            if isinstance(found, str):
                outcome.miss(node, found)
                continue
            _emit(node, op, found)
            outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
            program.graph.sort()
        return outcome


@dataclass(frozen=True)
class _HeadTransform:
    """What was done to Q or K on the way from the projections' row.

    Args:
        source: The part of the row that it was.
        tables: cos, sin and position_ids; empty without a rotation.
        norm: The norm's node, if there was one.
    """

    source: ir.Value
    tables: tuple[ir.Value, ...]
    norm: ir.Node | None


@dataclass(frozen=True)
class _MatchedAttention:
    """An Attention whose parts are turned as the kernels turn them."""

    parts: tuple[ir.Value, ir.Value, ir.Value]
    tables: tuple[ir.Value, ...]
    norms: tuple[ir.Node, ir.Node] | None


def padded(op: AttentionOp) -> bool:
    """Whether an Attention's mask is padding alone."""
    return is_landmark(op.mask, Landmark.PADDING_MASK)


def _found(op: AttentionOp) -> _MatchedAttention | str:
    """Return the row that Q, K and V are parts of, or why they are not."""
    if (outside := next(_outside(op), None)) is not None:
        return outside
    q, k = _turned(op.q, op.heads), _turned(op.k, op.groups)
    if (problem := next(_apart(op, q, k), None)) is not None:
        return problem
    norms = None if q.norm is None or k.norm is None else (q.norm, k.norm)
    return _MatchedAttention((q.source, k.source, op.v), q.tables, norms)


def _outside(op: AttentionOp) -> Iterator[str]:
    """Yield what the kernels do not compute."""
    if op.mask is not None and not padded(op):
        yield "its mask is more than padding"
    if op.nonpad_kv_seqlen is not None or op.qk is not None:
        yield "it takes lengths of keys, or gives scores"


def _apart(op: AttentionOp, q: _HeadTransform, k: _HeadTransform) -> Iterator[str]:
    """Yield why Q, K and V are not the parts of one row, turned alike."""
    parts = (q.source, k.source, op.v)
    if not _even(op, parts):
        yield "the heads of Q, K and V are not equally wide"
    elif op.past is None and (q.tables or q.norm is not None or _row(parts) is None):
        yield "it has no cache, and Q, K and V are not the parts of one row"
    if q.tables != k.tables or (q.norm is None) != (k.norm is None):
        yield "Q and K are turned in different ways"
    elif q.norm and k.norm and _epsilon(q.norm) != _epsilon(k.norm):
        yield "Q and K are normed with different epsilons"


def _row(parts: Sequence[ir.Value]) -> ir.Value | None:
    """Return the value that was split into these parts, if one was."""
    split = g.producer(parts[0], "Split")
    return None if split is None or list(split.outputs) != [*parts] else g.operand(split, 0)


def _even(op: AttentionOp, parts: Sequence[ir.Value]) -> bool:
    heads = (op.heads, op.groups, op.groups)
    widths = {
        None if size is None or size % count else size // count
        for size, count in zip((g.static(part, -1) for part in parts), heads, strict=True)
    }
    return len(widths) == 1 and None not in widths


def _turned(value: ir.Value, heads: int) -> _HeadTransform:
    tables: tuple[ir.Value, ...] = ()
    rotary = g.producer(value, "RotaryEmbedding")
    if rotary is not None and _plain_rotary(rotary, heads):
        tables = tuple(g.operand(rotary, i) for i in (1, 2, 3))
        value = g.operand(rotary, 0)
    norm = _head_norm(value)
    return (
        _HeadTransform(value, tables, None)
        if norm is None
        else _HeadTransform(norm[1], tables, norm[0])
    )


def _plain_rotary(node: ir.Node, heads: int) -> bool:
    if g.optional(node, 3) is None or g.attribute(node, "interleaved", 0):
        return False
    return bool(g.attribute(node, "num_heads", 0) == heads)


def _head_norm(value: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """Return the RMS norm of each head, between two reshapes, and what it norms."""
    flat = g.producer(value, "Reshape")
    norm = g.producer(_upright(flat.inputs[0]), "RMSNormalization") if flat is not None else None
    split = g.producer(_upright(norm.inputs[0]), "Reshape") if norm is not None else None
    if split is None or norm is None or g.rank(split.outputs[0]) != 4:
        return None
    if g.weight(norm.inputs[1]) is None or g.shape(split.inputs[0]) != g.shape(value):
        return None
    return norm, g.operand(split, 0)


def _upright(value: ir.Value | None) -> ir.Value | None:
    """Return ``value`` before heads and tokens were exchanged: a norm of heads is the same."""
    turned = g.producer(value, "Transpose")
    if turned is None or list(g.attribute(turned, "perm", ())) != [0, 2, 1, 3]:
        return value
    return turned.inputs[0]


def _epsilon(node: ir.Node) -> float:
    return float(g.attribute(node, "epsilon", 1e-5))


def _emit(node: ir.Node, op: AttentionOp, match: _MatchedAttention) -> None:
    build = g.Builder(node)
    attributes = kept(node, *_KEPT) | {"padded": int(op.mask is not None)}
    row = _row(match.parts)
    if row is None:
        row = build.op("Concat", match.parts, {"axis": -1})
    if op.past is None:
        out = build.op("PackedAttention", [row], attributes, domain=DOMAIN, name=node.name)
        g.replace(op.y, out)
        return
    norms: Sequence[ir.Value | None] = [None, None]
    if match.norms is not None:
        norms = [g.operand(norm, 1) for norm in match.norms]
        attributes["epsilon"] = _epsilon(match.norms[0])
    tables: Sequence[ir.Value | None] = match.tables or [None, None, None]
    inputs = [row, *norms, *tables, *op.past]
    outputs = build.ops(
        "CachedAttention", inputs, attributes, outputs=3, domain=DOMAIN, name=node.name
    )
    for old, new in zip(node.outputs, outputs, strict=True):
        g.replace(old, new)
