"""How operators compute on operands whose axes are in another order: one rule an operator.

A value *v* is turned by an order *p* where ``v = Transpose<p>(v')`` and *v'* is what is computed
instead: axis *i* of *v* is axis *p[i]* of *v'*. A rule says which operands have to be turned, what
changes in the operator, and how its results are turned then. An operator without a rule is one that
a Transpose does not go past.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.ir.traits import ALONG_AXIS, ELEMENTWISE, REDUCTIONS
from llmopt.passes.canonicalize import reshape_target
from llmopt.passes.movements import Movement, Order, inverse

Orders = Mapping[ir.Value, Order]
"""By which order each value is turned."""


@dataclass(frozen=True)
class Permuted:
    """What an operator is on turned operands.

    Args:
        operands: By which order each operand has to be turned that has to be.
        result: By which order its results are turned then.
        axis: Value of the attribute ``axis`` after the permutation, where the operator has one.
        numbers: Values of constant integer operands after the permutation, by operand number.
    """

    operands: Mapping[int, Order]
    result: Order
    axis: int | None = None
    numbers: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def attributes(self, node: ir.Node) -> dict[str, Any]:
        """Return the attributes of ``node`` then."""
        kept = {name: attr.value for name, attr in node.attributes.items()}
        kept.pop("allowzero", None)  # targets of reshapes are written anew, with 0 for a copy
        return kept if self.axis is None else {**kept, "axis": self.axis}


Rule = Callable[[ir.Node, Orders], Permuted | None]


def permuted(node: ir.Node, orders: Orders) -> Permuted | None:
    """Return what ``node`` is where its operands are turned, None if it is not known to be any."""
    rule = RULES.get(node.op_type) if node.domain == "" else None
    found = rule(node, orders) if rule is not None else None
    if found is None:
        return None
    wanted = {i: orders[v] for i, v in enumerate(node.inputs) if v is not None and v in orders}
    agreed = all(found.operands.get(i) == order for i, order in wanted.items())
    return found if agreed else None


def _any(node: ir.Node, orders: Orders) -> Order:
    """Return the order of the first operand that is turned."""
    return next(orders[value] for value in node.inputs if value is not None and value in orders)


def _order(node: ir.Node, orders: Orders) -> Order | None:
    """Return the order of the first operand; None if another one is turned instead."""
    first = node.inputs[0]
    return orders.get(first) if first is not None else None


def _each_number(node: ir.Node, orders: Orders) -> Permuted | None:
    order = _any(node, orders)
    depth = len(order)
    if g.rank(node.outputs[0]) != depth or any(out.uses() for out in node.outputs[1:]):
        return None
    operands = {}
    for index, value in enumerate(node.inputs):
        sizes = g.shape(value)
        if value is None:
            continue
        if sizes is None:
            return None
        if len(sizes) == depth:
            operands[index] = order
        elif not _in_place(sizes, order):
            return None
    return Permuted(operands, order)


def _in_place(sizes: Sequence[g.Dim], order: Order) -> bool:
    """Whether what is broadcast to turned values needs no turning."""
    offset = len(order) - len(sizes)
    return all(size == 1 or order[offset + i] == offset + i for i, size in enumerate(sizes))


def _along(default: int) -> Rule:
    """Return the rule of an operator that runs along its attribute ``axis``."""

    def rule(node: ir.Node, orders: Orders) -> Permuted | None:
        order = _order(node, orders)
        if order is None:
            return None
        return Permuted({0: order}, order, order[g.attribute(node, "axis", default)])

    return rule


def _concatenated(node: ir.Node, orders: Orders) -> Permuted | None:
    order = _any(node, orders)
    if any(g.rank(value) != len(order) for value in node.inputs):
        return None
    operands = dict.fromkeys(range(len(node.inputs)), order)
    return Permuted(operands, order, order[g.attribute(node, "axis", 0)])


def _last_axis(node: ir.Node, orders: Orders) -> Permuted | None:
    """Norms of the last axis and products with a matrix, where that axis stays the last."""
    order = _order(node, orders)
    last = len(order or ()) - 1
    if order is None or order[last] != last or any(out.uses() for out in node.outputs[1:]):
        return None
    if node.op_type == "MatMul":
        return Permuted({0: order}, order) if g.rank(node.inputs[1]) == 2 else None
    return Permuted({0: order}, order) if g.attribute(node, "axis", -1) in (-1, last) else None


def _sliced(node: ir.Node, orders: Orders) -> Permuted | None:
    order, starts = _order(node, orders), g.ints(node.inputs[1])
    axes = g.ints(g.optional(node, 3))
    if order is None or (axes is None and (starts is None or g.optional(node, 3) is not None)):
        return None
    axes = list(range(len(starts or ()))) if axes is None else axes
    return Permuted({0: order}, order, numbers={3: [order[axis] for axis in axes]})


def _gathered(node: ir.Node, orders: Orders) -> Permuted | None:
    order, index = _order(node, orders), g.rank(node.inputs[1])
    if order is None or index not in (0, 1):
        return None
    axis = g.attribute(node, "axis", 0) % len(order)
    return Permuted({0: order}, order if index else _without(order, [axis]), order[axis])


def _reduced(node: ir.Node, orders: Orders) -> Permuted | None:
    order, axes = _order(node, orders), g.ints(g.optional(node, 1))
    if order is None or not axes:
        return None
    axes = [axis % len(order) for axis in axes]
    result = order if g.attribute(node, "keepdims", 1) else _without(order, axes)
    return Permuted({0: order}, result, numbers={1: [order[axis] for axis in axes]})


def _squeezed(node: ir.Node, orders: Orders) -> Permuted | None:
    order, axes = _order(node, orders), g.ints(g.optional(node, 1))
    if order is None or axes is None:
        return None
    axes = [axis % len(order) for axis in axes]
    return Permuted({0: order}, _without(order, axes), numbers={1: [order[axis] for axis in axes]})


def _unsqueezed(node: ir.Node, orders: Orders) -> Permuted | None:
    """Put new axes where they are among the others; those are in another order."""
    order, axes = _order(node, orders), g.ints(node.inputs[1])
    if order is None or axes is None:
        return None
    depth = len(order) + len(axes)
    new = {axis % depth for axis in axes}
    old = [axis for axis in range(depth) if axis not in new]
    places = iter(order)
    result = [axis if axis in new else old[next(places)] for axis in range(depth)]
    return Permuted({0: order}, tuple(result), numbers={1: sorted(new)})


def _expanded(node: ir.Node, orders: Orders) -> Permuted | None:
    order, target = _order(node, orders), g.ints(node.inputs[1])
    if order is None or target is None or len(target) != len(order):
        return None
    return Permuted({0: order}, order, numbers={1: [target[axis] for axis in inverse(order)]})


def _reshaped(node: ir.Node, orders: Orders) -> Permuted | None:
    """Part and join the axes before they are turned, where those that are joined are neighbours."""
    order, sizes, after = _order(node, orders), g.shape(node.inputs[0]), g.shape(node.outputs[0])
    if order is None or sizes is None or after is None:
        return None
    before = [sizes[axis] for axis in inverse(order)]
    movement = Movement.start(before).transposed(order).reshaped(after)
    found = movement.reshape_first() if movement is not None else None
    if found is None:
        return None
    first, result = found
    target = reshape_target(before, list(first))
    return None if target is None else Permuted({0: order}, result, numbers={1: target})


def _without(order: Order, axes: Sequence[int]) -> Order:
    """Return the order of what is left where ``axes`` are gone.

    >>> _without((2, 0, 1), [0])
    (0, 1)
    """
    left = [position for axis, position in enumerate(order) if axis not in axes]
    return tuple(sorted(left).index(position) for position in left)


RULES: Final[Mapping[str, Rule]] = {
    **dict.fromkeys(ELEMENTWISE - {"CastLike"}, _each_number),
    **dict.fromkeys(REDUCTIONS, _reduced),
    **{name: _along(axis) for name, axis in ALONG_AXIS.items()},
    "Concat": _concatenated,
    "Expand": _expanded,
    "Gather": _gathered,
    "LayerNormalization": _last_axis,
    "MatMul": _last_axis,
    "RMSNormalization": _last_axis,
    "Reshape": _reshaped,
    "Slice": _sliced,
    "Split": _along(0),
    "Squeeze": _squeezed,
    "Unsqueeze": _unsqueezed,
}
