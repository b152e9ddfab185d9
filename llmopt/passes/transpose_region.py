"""What one transpose can be pushed past, and how many bytes fewer are turned then."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.passes.movements import Order, composed, inverse, stays
from llmopt.passes.transposed import Permuted, permuted

Bits = Counter[tuple[str, ...]]
"""How many bits, by the free dimensions that their number grows with."""
Places = Mapping[ir.Node, int]
"""Where each node of a graph stands."""


@dataclass
class Region:
    """What a transpose is pushed past.

    Args:
        start: The transpose.
        orders: By which order each value is turned: what ``start`` gives, and all that is
            computed of it here.
        steps: Permuted form of each operator, in order.
        reached: A transpose that could be undone, of those that can be reached.
    """

    start: ir.Node
    orders: dict[ir.Value, Order]
    steps: dict[ir.Node, Permuted] = field(default_factory=dict)
    reached: str = ""

    def readers(self, value: ir.Value) -> tuple[list[ir.Node], bool]:
        """Return the transposes that read ``value``, and whether anything else outside does."""
        outside = [node for node in g.users(value) if node not in self.steps]
        turns = [node for node in outside if g.is_op(node, "Transpose")]
        return turns, value.is_graph_output() or len(turns) < len(outside)

    @property
    def pays(self) -> bool:
        """Whether fewer bytes are turned, however long the free dimensions are."""
        read = [value for node, change in self.steps.items() for value in _operands(node, change)]
        spent = self._spent([*self.orders, *read])
        return any(spent.values()) and all(count <= 0 for count in spent.values())

    def trim(self, axes: Places) -> None:
        """Take operators away from the ends that it saves nothing to push a transpose past."""
        for node, change in reversed(list(self.steps.items())):
            if any(reader in self.steps for out in node.outputs for reader in g.users(out)):
                continue
            concerned = [*node.outputs, *_operands(node, change)]
            with_it = self._spent(concerned)
            self._drop(node)
            without = self._spent(concerned)
            if any(without[symbols] > with_it[symbols] for symbols in {*without, *with_it}):
                self.steps[node] = change
                self.orders |= dict.fromkeys(node.outputs, change.result)
        self.steps = dict(sorted(self.steps.items(), key=lambda step: axes[step[0]]))

    def _drop(self, node: ir.Node) -> None:
        del self.steps[node]
        for out in node.outputs:
            del self.orders[out]

    def meet(self) -> str:
        """Return the first transpose behind an operator here that moves no bytes any more."""
        return next(
            (
                turn.name or turn.op_type
                for value, order in self.orders.items()
                if value.producer() is not self.start
                for turn in self.readers(value)[0]
                if stays(_before(value, order), composed(order, order_of(turn, len(order))))
            ),
            "",
        )

    def _spent(self, values: Iterable[ir.Value]) -> Bits:
        """Return how many bits more are turned for these values; fewer is negative."""
        spent = Bits()
        for value in dict.fromkeys(values):
            for sign, bits in self._inside(value) if value in self.orders else self._beside(value):
                (spent.update if sign > 0 else spent.subtract)(bits)
        return spent

    def _inside(self, value: ir.Value) -> Iterator[tuple[int, Bits]]:
        """Yield what is turned, and what is no more, of a value that is computed here."""
        order, sizes = self.orders[value], g.shape(value) or []
        turns, read = self.readers(value)
        before = _before(value, order)
        if value.producer() is self.start and not read:
            yield -1, _bits(value, before, order)
        if value.producer() is not self.start and read:
            yield 1, _bits(value, before, order)
        for turn in turns:
            theirs = order_of(turn, len(order))
            yield -1, _bits(value, sizes, theirs)
            yield 1, _bits(value, before, composed(order, theirs))

    def _beside(self, value: ir.Value) -> Iterator[tuple[int, Bits]]:
        """Yield what is turned, and what is no more, of an operand from elsewhere."""
        uses = [(use.node, use.idx) for use in value.uses()]
        here = {
            self.steps[node].operands[index]
            for node, index in uses
            if node in self.steps and index in self.steps[node].operands
        }
        sizes, first = g.shape(value) or [], g.producer(value, "Transpose")
        if first is not None:
            theirs = order_of(first, len(sizes))
            sizes = _before(value, theirs)
            if not value.is_graph_output() and self._all_turned(uses):
                yield -1, _bits(value, sizes, theirs)
        if g.weight(value) is None:
            for order in here:
                yield 1, _bits(value, sizes, undoing(value, order))

    def _all_turned(self, uses: Iterable[tuple[ir.Node, int]]) -> bool:
        return all(
            node in self.steps and index in self.steps[node].operands for node, index in uses
        )


def grown(start: ir.Node, axes: Places) -> Region | None:
    """Return all that a transpose can be pushed past and that is worth it; None if nothing is."""
    depth = g.rank(start.outputs[0]) or g.rank(start.inputs[0])
    if depth is None or g.shape(start.outputs[0]) is None:
        return None
    region = Region(start, {start.outputs[0]: order_of(start, depth)})
    waiting = [(axes[n], n) for n in _next(start.outputs[0], axes)]
    seen = {node for _, node in waiting}
    heapq.heapify(waiting)
    while waiting:
        _, node = heapq.heappop(waiting)
        change = permuted(node, region.orders)
        if change is None or any(g.shape(out) is None for out in node.outputs):
            continue
        region.steps[node] = change
        for out in node.outputs:
            region.orders[out] = change.result
            if list(change.result) != sorted(change.result):
                for reader in _next(out, axes):
                    if reader not in seen:
                        seen.add(reader)
                        heapq.heappush(waiting, (axes[reader], reader))
    region.reached = region.meet()
    region.trim(axes)
    return region if region.steps or region.reached else None


def _next(value: ir.Value, axes: Places) -> list[ir.Node]:
    """Return the readers of a value that a transpose may be pushed past."""
    return [node for node in g.users(value) if node in axes and not g.is_op(node, "Transpose")]


def _operands(node: ir.Node, change: Permuted) -> list[ir.Value]:
    return [g.operand(node, index) for index in change.operands]


def order_of(node: ir.Node, depth: int) -> Order:
    """Return the order of a Transpose of a value that has ``depth`` axes."""
    given = g.attribute(node, "perm", None)
    return tuple(range(depth))[::-1] if given is None else tuple(given)


def undoing(value: ir.Value, order: Order) -> Order:
    """Return by which order to transpose what ``value`` is, or is transposed from, to undo it."""
    first, back = g.producer(value, "Transpose"), inverse(order)
    return back if first is None else composed(order_of(first, len(order)), back)


def _before(value: ir.Value, order: Order) -> list[g.Dim]:
    """Return the sizes of what ``value`` is transposed from by ``order``."""
    sizes = g.shape(value) or []
    return [sizes[axis] for axis in inverse(order)]


def _bits(value: ir.Value, sizes: Sequence[g.Dim], order: Order) -> Bits:
    """Return how many bits a Transpose moves of what is of these sizes and of a value's type."""
    if stays(sizes, order):
        return Bits()
    symbols = sorted(size for size in sizes if isinstance(size, str))
    count = math.prod(size for size in sizes if isinstance(size, int))
    return Bits({tuple(symbols): count * (value.dtype.bitwidth if value.dtype else 32)})
