"""Values of positions alone, computed for past and new tokens together.

In a decoder without a cache the prelude (masks, rotary tables, positions) is computed for the S
tokens that there are. Here it is copied with T = P + S in the place of S, and of what new tokens
meet only the last S rows are taken: as early as can be, so that a step does not pay for rows that
it does not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx_ir as ir

from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir.landmarks import Landmark, mark
from llmopt.ir.program import Program
from llmopt.passes.incremental.flow import refuse
from llmopt.passes.incremental.proofs import Proofs
from llmopt.passes.incremental.reading import tokens_of

_PAST: Final = np.iinfo(np.int64).max
_ROWWISE: Final = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Neg", "Abs", "Cast", "Cos", "Sin", "Exp", "Pow", "Sqrt"),
        *("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "And", "Or", "Not", "Where"),
        *("Min", "Max", "Clip", "Log", "Reciprocal", "Mod", "Tanh", "Identity"),
    }
)
"""Element-wise operators that rows of the result can be computed through."""


class Prelude:
    """The prelude of a decoder that is being given a cache.

    Args:
        program: The decoder; new nodes are put at the end of its graph.
        proofs: Proofs of which values vary with the number of tokens.
        past: A past of keys, [B, G, P, D].
    """

    def __init__(self, program: Program, proofs: Proofs, past: ir.Value) -> None:
        self._program = program
        self._proofs = proofs
        self._tokens = tokens_of(program)
        self._mask = program.input(Role.MASK)
        self._whole: dict[ir.Value, ir.Value] = {}
        self._rows: dict[tuple[ir.Value, int], ir.Value] = {}
        self._placed: dict[tuple[ir.Value, int, int], ir.Value] = {}
        self.build = g.Builder(program.graph)
        self.batch = self._size(self._tokens, 0, "batch")
        self.new = self._size(self._tokens, 1, "new")
        total = self._size(self._mask, 1, Landmark.TOTAL.value) if self._mask else self._sum(past)
        self.total = mark(total, Landmark.TOTAL)
        self._start = self.build.op("Neg", [self.new], name="past/rows")

    def at_full_length(self, value: ir.Value) -> ir.Value:
        """Return ``value`` for all T tokens."""
        if not self._proofs.varies(value) or value is self._mask:
            return value
        if value not in self._whole:
            node = value.producer()
            assert node is not None
            self._copy(node)
        return self._whole[value]

    def rows(self, value: ir.Value, axis: int) -> ir.Value:
        """Return the last S rows of ``value`` for all T tokens, along ``axis``."""
        key = value, axis % (g.rank(value) or 1)
        if key not in self._rows:
            self._rows[key] = self._through(*key) or self._last(self.at_full_length(value), key[1])
        return self._rows[key]

    def placed(self, value: ir.Value, rows: int, batch: int) -> ir.Value:
        """Return the rows of ``value`` for all T tokens that ``position_ids`` ask for.

        Args:
            value: Value to lay out; the same for every sequence.
            rows: Axis of tokens of the value.
            batch: Axis that sequences shall be on; below 0 in front of its own.
        """
        key = value, rows, batch
        if key not in self._placed:
            self._placed[key] = self._looked_up(*key)
        return self._placed[key]

    def _looked_up(self, value: ir.Value, rows: int, batch: int) -> ir.Value:
        positions = self._program.input(Role.POSITIONS)
        dims = g.shape(value)
        assert positions is not None
        assert dims is not None
        node = g.producer(value, "Gather")
        if node is not None and (rows, batch) == (0, -1) and self._is_lookup(node):
            index = self.placed(g.operand(node, 1), 0, -1)
            found = self.build.op("Gather", [node.inputs[0], index], name=node.name)
        else:
            found = self._moved(self.at_full_length(value), rows, batch, positions)
        found.type = value.type
        front = max(0, -batch)
        after = [*([1] * front), *dims]
        after[rows + front], after[batch + front] = "S", "B"
        found.shape = ir.Shape(after)
        return found

    def _is_lookup(self, node: ir.Node) -> bool:
        """Whether rows of a fixed table are looked up by one row of numbers."""
        fixed = not self._proofs.varies(g.operand(node, 0)) and g.attribute(node, "axis", 0) == 0
        return fixed and g.rank(node.inputs[1]) == 1

    def _moved(self, value: ir.Value, rows: int, batch: int, positions: ir.Value) -> ir.Value:
        """Look rows up, and put the axis of sequences where it belongs."""
        rank = g.rank(value) or 0
        if batch < 0:
            ones = list(range(-batch - 1))  # what stands between it and the axes there are
            if ones:
                value = self.build.op("Unsqueeze", [value, self.build.constant(ones, "int64")])
            rows, batch, rank = rows + len(ones), 0, rank + len(ones)
        else:
            value = self.build.op("Squeeze", [value, self.build.constant([batch], "int64")])
            rows, rank = rows - (batch < rows), rank - 1
        found = self.build.op("Gather", [value, positions], {"axis": rows})
        order = [axis for axis in range(rank + 1) if axis != rows]
        order.insert(batch, rows)
        if order == sorted(order):
            return found
        return self.build.op("Transpose", [found], {"perm": order})

    def _size(self, value: ir.Value, axis: int, name: str) -> ir.Value:
        found = self.build.op("Shape", [value], {"start": axis, "end": axis + 1}, name=name)
        return _typed(found, 1)

    def _sum(self, past: ir.Value) -> ir.Value:
        before = self._size(past, 2, "past")
        return _typed(self.build.op("Add", [before, self.new], name=Landmark.TOTAL.value), 1)

    def _copy(self, node: ir.Node) -> None:
        if node.op_type == "Shape":
            self._whole[node.outputs[0]] = self._shape(node)
            return
        if any(attr.type is ir.AttributeType.GRAPH for attr in node.attributes.values()):
            raise refuse(node, "chooses between graphs by the number of tokens")
        inputs = [None if value is None else self.at_full_length(value) for value in node.inputs]
        for old, new in zip(node.outputs, self._made(node, inputs), strict=True):
            new.type = old.type
            new.shape = _with_total(old.shape)
            self._whole[old] = new

    def _made(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> Sequence[ir.Value]:
        attributes = {name: attr.value for name, attr in node.attributes.items()}
        count = len(node.outputs)
        return self.build.ops(node.op_type, inputs, attributes, outputs=count, name=node.name)

    def _shape(self, node: ir.Node) -> ir.Value:
        """Return what ``node`` says of sizes, with all tokens for the new ones."""
        dims = g.shape(node.inputs[0]) or []
        start, end = g.attribute(node, "start", 0), g.attribute(node, "end", len(dims))
        known = {"B": self.batch, "S": self.total}
        parts = []
        for dim in dims[start:end]:
            if isinstance(dim, int):
                parts.append(self.build.constant([dim], "int64"))
            elif dim in known:
                parts.append(known[dim])
            else:
                raise refuse(node, f"gives a size {dim}, which is not known beforehand")
        if len(parts) == 1:
            return parts[0]
        return _typed(self.build.op("Concat", parts, {"axis": 0}), len(parts))

    def _last(self, value: ir.Value, axis: int) -> ir.Value:
        bounds = [self.build.constant([number], "int64") for number in (_PAST, axis)]
        found = self.build.op("Slice", [value, self._start, *bounds], name="past/Slice")
        found.type = value.type
        if (dims := g.shape(value)) is not None:
            found.shape = ir.Shape([*dims[:axis], "S", *dims[axis + 1 :]])
        return found

    def _through(self, value: ir.Value, axis: int) -> ir.Value | None:
        """Return the rows computed of rows, where the operator lets that be done."""
        node = g.producer(value, *_ROWWISE, "Unsqueeze", "Gather", "Slice")
        dims = g.shape(value)
        if node is None or dims is None or not self._proofs.varies(value):
            return None
        inputs = self._row_inputs(node, axis, len(dims))
        if inputs is None:
            return None
        (found,) = self._made(node, inputs)
        found.type = value.type
        after = _with_total(value.shape)
        assert after is not None
        found.shape = ir.Shape([*after[:axis], "S", *after[axis + 1 :]])
        return found

    def _row_inputs(self, node: ir.Node, axis: int, rank: int) -> list[ir.Value | None] | None:
        """Return the operands of ``node`` with rows taken, or None where that is not the same."""
        if node.op_type == "Gather":
            return self._gathered_rows(node, axis)
        if node.op_type not in ("Unsqueeze", "Slice"):
            return self._broadcast_rows(node, axis, rank)
        given = g.ints(node.inputs[1] if node.op_type == "Unsqueeze" else g.optional(node, 3))
        axes = [each % rank for each in given or range(rank)]
        if axis in axes:
            return None
        moved = sum(each < axis for each in axes) if node.op_type == "Unsqueeze" else 0
        rest = [None if value is None else self.at_full_length(value) for value in node.inputs[1:]]
        return [self.rows(g.operand(node, 0), axis - moved), *rest]

    def _gathered_rows(self, node: ir.Node, axis: int) -> list[ir.Value | None] | None:
        table, index = g.operand(node, 0), g.operand(node, 1)
        fixed = g.attribute(node, "axis", 0) == 0 and not self._proofs.varies(table)
        return [table, self.rows(index, axis)] if fixed and axis < (g.rank(index) or 0) else None

    def _broadcast_rows(self, node: ir.Node, axis: int, rank: int) -> list[ir.Value | None] | None:
        found: list[ir.Value | None] = []
        for value in node.inputs:
            dims = g.shape(value)
            if value is None or dims is None:
                return None
            at = axis - rank + len(dims)
            if at < 0 or dims[at] == 1:
                found.append(self.at_full_length(value))
            elif dims[at] == "S":
                found.append(self.rows(value, at))
            else:
                return None
        return found


def _typed(value: ir.Value, count: int) -> ir.Value:
    """Return ``value``, known to be this many integers."""
    value.shape, value.type = ir.Shape([count]), ir.TensorType(ir.DataType.INT64)
    return value


def _with_total(shape: ir.Shape | None) -> ir.Shape | None:
    """Return a shape with T for each S."""
    if shape is None:
        return None
    names = [dim if isinstance(dim, int) else dim.value for dim in shape]
    return ir.Shape(["T" if name == "S" else name for name in names])
