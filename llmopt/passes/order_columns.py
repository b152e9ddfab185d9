"""Store the columns of a projection in the order in which its parts are read.

Rewrites::

    q, k, v = Split<3>(Reshape(MatMul(x, W) + b, [B, S, H, 3 D]))
    into    q, k, v = Reshape(Split<2>(MatMul(x, W') + b'))    W' and b' with all of q first, then k
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.program import Program
from llmopt.ir.sizes import shape_of
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.canonicalize import reshape_target
from llmopt.passes.merge_projections import Projection, projection

Columns = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _ColumnRange:
    """A part of what a projection makes.

    Args:
        value: Value that is read.
        columns: Columns of the projection, in the order of the part.
    """

    value: ir.Value
    columns: Columns


@dataclass(frozen=True)
class OrderColumns(Pass):
    """Let the parts of a projection be runs of its columns, so that a Split gives them.

    A projection to [heads, 3, width] or to [3, heads, width] is then read as one to queries, keys
    and values is, without a strided copy; so is one of which a part of each head is rotated, and
    a transpose of columns alone is none any more.

    Numerics: exact; weights move, and none changes.
    Scope: projections that are reshaped and then cut by Split, Slice and Gather of known places, or
    whose columns are transposed.
    Leaves: parts that overlap or leave columns out, weights that something else reads, and a
    projection that is also read as a whole.
    """

    name: ClassVar[str] = "order-columns"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in g.nodes(program.graph, "Reshape"):
            found = projection(g.operand(node, 0))
            if isinstance(found, str) or not _cuts(node, found):
                continue
            if reason := _order(node, found):
                outcome.miss(node, reason)
            else:
                outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


def _cuts(node: ir.Node, projection: Projection) -> bool:
    """Whether a Reshape parts the columns of a projection, and they are then cut or turned."""
    outer = (g.rank(projection.result) or 1) - 1
    columns = np.arange(g.static(projection.result, -1) or 0, dtype=np.int64)
    parted = _reshaped(node, columns, outer)
    if parted is None or parted[0].ndim < 2:
        return False
    return any(
        g.is_op(reader, *_READS) and _parts(reader, parted[0], outer) is not None
        for reader in g.users(node.outputs[0])
    )


def _order(node: ir.Node, projection: Projection) -> str | None:
    """Put the columns in order; return why not, if not."""
    parts = _all_parts(node, projection)
    if isinstance(parts, str):
        return parts
    outer = (g.shape(projection.result) or [])[:-1]
    if any(_target(outer, part) is None for part in parts):
        return "no constant says the sizes of its parts"
    order = np.concatenate([part.columns.reshape(-1) for part in parts])
    whole = projection.result
    if not np.array_equal(order, np.arange(order.size)):
        if len(g.operand(projection.product, 1).uses()) > 1:
            return "its weight is read elsewhere"
        whole = _ordered(projection, order)
    elif len(parts) == 1:
        return "it is in order, and has one part alone"
    _split(g.Builder(node), whole, parts)
    return None


def _all_parts(node: ir.Node, projection: Projection) -> list[_ColumnRange] | str:
    """Return what is read of a projection, in the order of its columns, or why that is not all."""
    if g.sole_user(projection.result) is not node or node.outputs[0].is_graph_output():
        return "the whole projection is read, too"
    outer = (g.rank(projection.result) or 1) - 1
    columns = np.arange(g.static(projection.result, -1) or 0, dtype=np.int64)
    (parted,) = _reshaped(node, columns, outer) or [columns]
    parts: list[_ColumnRange] = []
    for reader in g.users(node.outputs[0]):
        cut = _parts(reader, parted, outer)
        if cut is None:
            return f"{reader.op_type} {reader.name!r} reads it, and no known columns of each row"
        parts.extend(each for part in cut for each in _finest(part, outer))
    parts.sort(key=lambda part: int(part.columns.min()))
    return parts if _covered(columns, parts) else "its parts overlap, or leave columns out"


def _finest(part: _ColumnRange, outer: int) -> list[_ColumnRange]:
    """Return the parts of a part that are read and nothing else of it; itself, if it is."""
    cuts = [_parts(reader, part.columns, outer) for reader in g.users(part.value)]
    finer = [each for cut in cuts if cut is not None for each in cut]
    if None in cuts or not _covered(part.columns, finer):
        return [part]
    return [finest for each in finer for finest in _finest(each, outer)]


def _covered(columns: Columns, parts: Sequence[_ColumnRange]) -> bool:
    """Whether each of some columns is in one of the parts, and none in two."""
    read = [column for part in parts for column in part.columns.reshape(-1)]
    return sorted(read) == sorted(columns.reshape(-1))


def _target(outer: list[g.Dim], part: _ColumnRange) -> list[int] | None:
    return reshape_target([*outer, part.columns.size], g.shape(part.value) or [])


def _parts(node: ir.Node, columns: Columns, outer: int) -> list[_ColumnRange] | None:
    """Return what ``node`` reads, or None where it is not known."""
    cut = _CUTS.get(node.op_type) if node.domain == "" else None
    pieces = cut(node, columns, outer) if cut is not None else None
    if pieces is None or any(out.is_graph_output() for out in node.outputs):
        return None
    if any(piece.size == 0 for piece in pieces):
        return None
    return [_ColumnRange(out, piece) for out, piece in zip(node.outputs, pieces, strict=True)]


def _gathered(node: ir.Node, columns: Columns, outer: int) -> list[Columns] | None:
    axis, places = _axis(node, columns, outer), g.constant(node.inputs[1])
    if axis < 0 or places is None or places.ndim > 1:
        return None
    return [columns.take(places, axis)]


def _cut(node: ir.Node, columns: Columns, outer: int) -> list[Columns] | None:
    axis = _axis(node, columns, outer)
    sizes = [g.static(out, outer + axis) or 0 for out in node.outputs]
    if axis < 0 or sum(sizes) != columns.shape[axis]:
        return None
    return np.split(columns, np.cumsum(sizes)[:-1], axis)


def _axis(node: ir.Node, columns: Columns, outer: int) -> int:
    """Return along which axis of the columns ``node`` cuts; less than 0 for one of the rows."""
    return int(g.attribute(node, "axis", 0)) % (outer + columns.ndim) - outer


def _turned(node: ir.Node, columns: Columns, outer: int) -> list[Columns] | None:
    order = [*g.attribute(node, "perm", ())]
    if order[:outer] != list(range(outer)) or len(order) != outer + columns.ndim:
        return None
    return [columns.transpose([axis - outer for axis in order[outer:]])]


def _reshaped(node: ir.Node, columns: Columns, outer: int) -> list[Columns] | None:
    before, after = g.shape(node.inputs[0]), g.shape(node.outputs[0])
    if before is None or after is None or after[:outer] != before[:outer]:
        return None
    inner = [size for size in after[outer:] if isinstance(size, int)]
    if len(inner) != len(after) - outer or math.prod(inner) != columns.size:
        return None
    return [columns.reshape(inner)]


def _sliced(node: ir.Node, columns: Columns, outer: int) -> list[Columns] | None:
    starts, ends = g.ints(node.inputs[1]), g.ints(node.inputs[2])
    axes, steps = g.ints(g.optional(node, 3)), g.ints(g.optional(node, 4))
    if g.optional(node, 4) is None and axes is not None:
        steps = [1] * len(axes)
    if starts is None or ends is None or axes is None or steps is None or min(steps) < 1:
        return None
    cut: list[Any] = [slice(None)] * columns.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        position = axis % (outer + columns.ndim) - outer
        if position < 0:
            return None
        cut[position] = slice(start, end, step)
    return [columns[tuple(cut)]]


_CUTS: Final[Mapping[str, Callable[[ir.Node, Columns, int], list[Columns] | None]]] = {
    "Gather": _gathered,
    "Reshape": _reshaped,
    "Slice": _sliced,
    "Split": _cut,
    "Squeeze": _reshaped,
    "Transpose": _turned,
}
_READS: Final = ("Gather", "Slice", "Split", "Transpose")
"""What reads columns in another way than all of them in order."""


def _ordered(projection: Projection, order: Columns) -> ir.Value:
    """Return the projection with its columns in another order."""
    build, like = g.Builder(projection.product), projection.result
    x, product = g.operand(projection.product, 0), g.operand(projection.product, 1)
    weight = build.initializer(
        f"{product.name}.ordered", weights.taken(projection.weight, order, 1)
    )
    out = build.op("MatMul", [x, weight], name=projection.product.name, like=like)
    if projection.bias is None:
        return out
    bias = build.initializer(
        f"{product.name}.bias.ordered", weights.taken(projection.bias, order, 0)
    )
    return build.op("Add", [out, bias], like=like)


def _split(build: g.Builder, columns: ir.Value, parts: Sequence[_ColumnRange]) -> None:
    """Let a Split give the parts of what a projection makes; one part is all of it."""
    pieces: Sequence[ir.Value] = [columns]
    if len(parts) > 1:
        sizes = build.constant([part.columns.size for part in parts], "int64")
        pieces = build.ops("Split", [columns, sizes], {"axis": -1}, outputs=len(parts))
    outer = (g.shape(columns) or [])[:-1]
    for part, piece in zip(parts, pieces, strict=True):
        piece.shape, piece.type = shape_of([*outer, part.columns.size]), columns.type
        g.replace(part.value, _shaped(build, piece, part, outer))


def _shaped(build: g.Builder, piece: ir.Value, part: _ColumnRange, outer: list[g.Dim]) -> ir.Value:
    """Return a piece in the form in which the part is read."""
    target, after = _target(outer, part) or [], g.shape(part.value) or []
    if after == [*outer, part.columns.size]:
        return piece
    sizes = build.constant(target, "int64")
    return build.op("Reshape", [piece, sizes], like=piece, shape=shape_of(after))
