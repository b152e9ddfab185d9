"""Operators of the dialect in Relax's own, for GPUs: attention, rotation, norms and products.

The kernels of this package are for CPUs. Here every operator becomes operators of Relax
that TVM legalizes, fuses and schedules for a GPU. Products, norms and the softmax sum in float32
whatever they read, and what is not seen has a finite score, so that a row of padding alone stays
finite too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import onnx_ir as ir

from llmopt.backends.tvm import api, arithmetic, movement
from llmopt.backends.tvm.writing import dtype_of, shape_of
from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.attention import AttentionAttributes, AttentionOp
from llmopt.ir.program import Program

if TYPE_CHECKING:
    from llmopt.backends.tvm.function import Function

Rule = Callable[["Function", ir.Node], Sequence[Any]]
_WIDE: Final = "float32"
_HIDDEN: Final = -1e30
"""The score of a key that is not seen."""


def attention(f: Function, node: ir.Node) -> Sequence[Any]:
    """Write attention of grouped heads; a past is copied in front of the new keys.

    Scores are [B, G, R·S, T] with R = H/G queries a group, so that no key is repeated.
    """
    op, form = api.relax().op, AttentionOp.of(node)
    heads, groups = form.heads, form.groups
    counts = (heads, groups, groups)
    q, k, v = (_heads(f, f.tensor(x), n) for x, n in zip(form.qkv, counts, strict=True))
    if form.past is not None:
        k, v = (_after(f, f.tensor(past), x) for past, x in zip(form.past, (k, v), strict=True))
    dtype = dtype_of(q)
    (batch, _, new, width), keys = shape_of(q), shape_of(k)[2]
    rows = api.simplify(heads // groups * new)
    q = f.emit(op.reshape(q, [batch, groups, rows, width]))
    turned = f.emit(op.permute_dims(k, [0, 1, 3, 2]))
    scores = f.emit(op.matmul(q, turned, out_dtype=_WIDE))
    scores = f.emit(op.reshape(scores, [batch, heads, new, keys]))
    weight = f.emit(op.nn.softmax(_masked(f, form, scores, width), -1))
    weight = f.emit(op.reshape(_cast(f, weight, dtype), [batch, groups, rows, keys]))
    mixed = _cast(f, f.emit(op.matmul(weight, v, out_dtype=_WIDE)), dtype)
    mixed = f.emit(op.reshape(mixed, [batch, heads, new, shape_of(v)[3]]))
    mixed = f.emit(op.permute_dims(mixed, [0, 2, 1, 3]))
    return [op.reshape(mixed, [batch, new, heads * shape_of(v)[3]]), k, v]


def _after(f: Function, past: Any, x: Any) -> Any:
    """Return [B, G, T, D] of past and new keys; T is a symbol, as kernels can be scheduled for."""
    batch, groups, _, width = shape_of(x)
    kind = api.tensor_type([batch, groups, f.total, width], dtype_of(x))
    whole = f.emit(api.relax().op.concat([past, x], 2))
    return f.module.builder.match_cast(whole, kind)


def _heads(f: Function, x: Any, count: int) -> Any:
    """Return ``x`` [B, S, N·D] as [B, N, S, D]."""
    op = api.relax().op
    batch, tokens, width = shape_of(x)
    split = f.emit(op.reshape(x, [batch, tokens, count, width // count]))
    return f.emit(op.permute_dims(split, [0, 2, 1, 3]))


def _masked(f: Function, form: AttentionOp, scores: Any, width: int) -> Any:
    """Return scores [B, H, S, T] scaled and capped, those of unseen keys beyond any other."""
    op = api.relax().op
    scale = form.scaling(width)
    scores = f.emit(op.multiply(scores, api.scalar(float(scale), _WIDE)))
    if cap := form.softcap:
        bounded = f.emit(op.tanh(f.emit(op.divide(scores, api.scalar(cap, _WIDE)))))
        scores = f.emit(op.multiply(bounded, api.scalar(cap, _WIDE)))
    mask = None if form.mask is None else f.tensor(form.mask)
    if mask is not None and dtype_of(mask) != "bool":
        wide = f.emit(op.maximum(_cast(f, mask, _WIDE), api.scalar(_HIDDEN, _WIDE)))
        scores, mask = f.emit(op.add(scores, wide)), None
    for seen in _seen(f, form, *shape_of(scores)[2:]):
        mask = seen if mask is None else f.emit(op.logical_and(mask, seen))
    return scores if mask is None else f.emit(op.where(mask, scores, api.scalar(_HIDDEN, _WIDE)))


def _seen(f: Function, form: AttentionAttributes, new: Any, keys: Any) -> Iterator[Any]:
    """Yield which keys a query may see by its place alone, [S, T] each."""
    op = api.relax().op
    if not form.placed:
        return
    left, right = form.window
    before = api.simplify(keys - new)
    column = f.emit(op.arange(0, keys, 1, "int64"))
    place = f.emit(op.strided_slice(column, [0], [before], [keys], assume_inbound=True))
    row = f.emit(op.expand_dims(place, 1))
    behind = f.emit(op.subtract(row, f.emit(op.expand_dims(column, 0))))  # how far back a key is
    if form.causal:
        yield f.emit(op.greater_equal(behind, api.scalar(0, "int64")))
    if left >= 0:
        yield f.emit(op.less_equal(behind, api.scalar(left, "int64")))
    if right >= 0:
        yield f.emit(op.greater_equal(behind, api.scalar(-right, "int64")))


def rotary(f: Function, node: ir.Node) -> Sequence[Any]:
    """Write the rotation of the halves of each head by the angles of its position."""
    op = api.relax().op
    x, cos, sin = (f.tensor(node.inputs[i]) for i in range(3))
    batch, tokens, width = shape_of(x)
    heads, half = g.attribute(node, "num_heads", 1), shape_of(cos)[-1]
    if g.optional(node, 3) is not None:
        places = f.tensor(node.inputs[3])
        cos, sin = (f.emit(op.take(table, places, 0, "clip")) for table in (cos, sin))
    cos, sin = (f.emit(op.expand_dims(table, 2)) for table in (cos, sin))
    x = f.emit(op.reshape(x, [batch, tokens, heads, width // heads]))
    ends = [0, half, 2 * half, width // heads]
    first, second, rest = (
        f.emit(op.strided_slice(x, [3], [start], [end], assume_inbound=True))
        for start, end in pairwise(ends)
    )
    turned = [
        op.subtract(f.emit(op.multiply(cos, first)), f.emit(op.multiply(sin, second))),
        op.add(f.emit(op.multiply(sin, first)), f.emit(op.multiply(cos, second))),
    ]
    parts = [f.emit(part) for part in turned] + ([rest] if ends[2] < ends[3] else [])
    return [op.reshape(f.emit(op.concat(parts, 3)), [batch, tokens, width])]


def norm(f: Function, node: ir.Node) -> Sequence[Any]:
    """Write a norm over the last axis; deviations are squared after the mean was taken off."""
    op = api.relax().op
    x = f.tensor(node.inputs[0])
    dtype = dtype_of(x)
    wide = _cast(f, x, _WIDE)
    if node.op_type == "LayerNormalization":
        wide = f.emit(op.subtract(wide, f.emit(op.mean(wide, [-1], keepdims=True))))
    square = f.emit(op.mean(f.emit(op.multiply(wide, wide)), [-1], keepdims=True))
    eps = api.scalar(float(g.attribute(node, "epsilon", 1e-5)), _WIDE)
    root = f.emit(op.sqrt(f.emit(op.add(square, eps))))
    y = _cast(f, f.emit(op.divide(wide, root)), dtype)
    y = f.emit(op.multiply(y, f.tensor(node.inputs[1])))
    return [y if g.optional(node, 2) is None else op.add(y, f.tensor(node.inputs[2]))]


def gather(f: Function, node: ir.Node) -> Sequence[Any]:
    """Write a lookup; a number outside the table finds its edge, not foreign memory."""
    x, index = (f.tensor(node.inputs[i]) for i in (0, 1))
    return [api.relax().op.take(x, index, g.attribute(node, "axis", 0), "clip")]


def matmul(f: Function, node: ir.Node) -> Sequence[Any]:
    """Write a product; a transposed weight is stored as it was and read by rows."""
    op = api.relax().op
    x, tensor = f.tensor(node.inputs[0]), g.weight(node.inputs[1])
    if tensor is not None and weights.is_transpose(tensor):
        y = f.emit(op.permute_dims(f.weight(weights.parts_of(tensor)[0]), [1, 0]))
    else:
        y = f.tensor(node.inputs[1])
    dtype = dtype_of(x)
    return [_cast(f, f.emit(op.matmul(x, y, out_dtype=_WIDE)), dtype)]


def _cast(f: Function, x: Any, dtype: str) -> Any:
    return x if dtype_of(x) == dtype else f.emit(api.relax().op.astype(x, dtype))


RULES: Final[Mapping[str, Rule]] = {
    **arithmetic.RULES,
    **movement.RULES,
    "Attention": attention,
    "Gather": gather,
    "LayerNormalization": norm,
    "MatMul": matmul,
    "RMSNormalization": norm,
    "RotaryEmbedding": rotary,
}


def unsupported(program: Program) -> list[str]:
    """Return every operator, or form of one, that no rule writes."""
    return [problem for node in program.graph for problem in _problems(node)]


def _problems(node: ir.Node) -> Iterator[str]:
    name = f"{node.op_type} ({node.name!r})"
    if node.domain or node.op_type not in RULES:
        yield f"no kernel for {name}"
    if node.op_type in ("Attention", "RotaryEmbedding") and g.rank(node.inputs[0]) == 4:
        yield f"{name} reads heads of their own axis"
    if node.op_type == "RotaryEmbedding" and g.attribute(node, "interleaved", 0):
        yield f"{name} is interleaved"
    if node.op_type == "Attention" and AttentionOp.of(node).nonpad_kv_seqlen is not None:
        yield f"{name} takes the lengths of padded keys"
