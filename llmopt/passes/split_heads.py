"""Compute batched products on [batch, heads, ...] where they are on [batch * heads, ...].

Rewrites::

    Reshape(MatMul(Reshape(q), Reshape(k)) + bias)    into    MatMul(q, k) + Reshape(bias)

with ``q`` and ``k`` [B, H, S, D], their reshapes to [B * H, S, D] and the outer one back to
[B, H, S, T]. Attention then has the four axes that it is recognized by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass

_ELEMENTWISE: Final = frozenset({"Add", "Sub", "Mul", "Div", "Where", "Cast", "Neg", "Tanh"})


@dataclass(frozen=True)
class SplitHeads(Pass):
    """Move the reshape that splits batch and heads from the result of a product to its operands.

    Numerics: exact. Scope: the graph. Leaves: reshapes that change more than the first axis,
    and those of anything but a product and what is computed of it element by element.
    """

    name: ClassVar[str] = "split-heads"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in g.nodes(program.graph, "Reshape"):
            x, out = g.operand(node, 0), node.outputs[0]
            sizes = g.shape(out)
            if sizes is None or not _splits(g.shape(x), sizes) or not _has_product(x):
                continue
            heads = sizes[1]
            assert isinstance(heads, int)
            g.replace(out, _Splitter(g.Builder(node), sizes[0], heads).split(x))
            outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


def _splits(before: list[g.Dim] | None, after: list[g.Dim]) -> bool:
    """Whether a Reshape takes [N, S, T] to [B, H, S, T]."""
    if before is None or len(before) != 3 or len(after) != 4 or not isinstance(after[1], int):
        return False
    return before[1:] == after[2:] and after[1] > 1


def _has_product(value: ir.Value) -> bool:
    """Whether ``value`` is a batched product, or computed of one element by element."""
    node = value.producer()
    if node is None or len(g.users(value)) != 1 or value.is_graph_output():
        return False
    if g.is_op(node, "MatMul"):
        return all(g.rank(operand) == 3 for operand in node.inputs)
    if not g.is_op(node, *_ELEMENTWISE):
        return False
    return any(v is not None and g.rank(v) == 3 and _has_product(v) for v in node.inputs)


class _Splitter:
    """Rebuilds values of three axes with four.

    Args:
        build: Builder at the position of the new nodes.
        batch: B.
        heads: H; the first axis is B * H, or 1.
    """

    def __init__(self, build: g.Builder, batch: g.Dim, heads: int) -> None:
        self._build = build
        self._batch = batch
        self._heads = heads
        self._known: dict[ir.Value, ir.Value] = {}

    def split(self, value: ir.Value) -> ir.Value:
        """Return ``value`` [N, S, T] as [B, H, S, T]; what has fewer axes as it is."""
        if value not in self._known:
            self._known[value] = self._split(value)
        return self._known[value]

    def _split(self, value: ir.Value) -> ir.Value:
        sizes = g.shape(value)
        if sizes is None or len(sizes) < 3:
            return value
        node = value.producer()
        if node is not None and len(g.users(value)) == 1 and not value.is_graph_output():
            if g.is_op(node, "MatMul") and all(g.rank(v) == 3 for v in node.inputs):
                return self._again(node, sizes)
            if g.is_op(node, *_ELEMENTWISE) and value is node.outputs[0]:
                return self._again(node, sizes)
            if g.is_op(node, "Transpose") and [*g.attribute(node, "perm", ())] == [0, 2, 1]:
                inner = self.split(g.operand(node, 0))
                return self._made("Transpose", [inner], {"perm": [0, 1, 3, 2]}, sizes)
        if node is not None and g.is_op(node, "Reshape"):
            inner, before = g.operand(node, 0), g.shape(node.inputs[0])
            if before is not None and _splits(sizes, before) and before[1] == self._heads:
                return inner
        return self._reshaped(value, sizes)

    def _again(self, node: ir.Node, sizes: list[g.Dim]) -> ir.Value:
        """Return the node's result, computed of split operands."""
        inputs = [None if v is None else self.split(v) for v in node.inputs]
        attributes = {name: attr.value for name, attr in node.attributes.items()}
        return self._made(node.op_type, inputs, attributes, sizes, node)

    def _made(
        self,
        op_type: str,
        inputs: list[ir.Value | None] | list[ir.Value],
        attributes: dict[str, object],
        sizes: list[g.Dim],
        like: ir.Node | None = None,
    ) -> ir.Value:
        name = None if like is None else like.name
        source = like.outputs[0] if like is not None else next(v for v in inputs if v is not None)
        shape = self._shape(sizes)
        return self._build.op(
            op_type, list(inputs), attributes, name=name, like=source, shape=shape
        )

    def _shape(self, sizes: list[g.Dim]) -> ir.Shape:
        outer: list[g.Dim] = [1, 1] if sizes[0] == 1 else [self._batch, self._heads]
        return ir.Shape([*outer, *sizes[1:]])

    def _reshaped(self, value: ir.Value, sizes: list[g.Dim]) -> ir.Value:
        """Return ``value`` with its first axis split by a Reshape of its own."""
        build = self._build
        if sizes[0] == 1:
            out = build.op("Unsqueeze", [value, build.constant([0], "int64")])
        else:
            outer = build.constant([-1, self._heads], "int64")
            inner = build.op(
                "Shape", [value], {"start": 1, "end": 3}, shape=[2], dtype=ir.DataType.INT64
            )
            target = build.op("Concat", [outer, inner], {"axis": 0}, like=inner, shape=[4])
            out = build.op("Reshape", [value, target])
        out.type, out.shape = value.type, self._shape(sizes)
        return out
