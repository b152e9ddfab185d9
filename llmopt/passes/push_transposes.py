"""Push transposes past what computes alike in either order, to where others undo them.

Rewrites::

    Transpose<0,2,1,3>(RMSNormalization(Transpose<0,2,1,3>(x)))    into    RMSNormalization(x)
    Add(Transpose(a), Transpose(b))                                into    Transpose(Add(a, b))
    Transpose<0,2,1,3>(Split<0>(Transpose<2,0,3,1,4>(x))[i])       into    Split<2>(x)[i]

All that one transpose can be pushed past is taken together, and is rewritten if fewer bytes are
turned then, whatever the free dimensions are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.program import Program
from llmopt.ir.sizes import shape_of
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.canonicalize import reshape_target
from llmopt.passes.movements import Order, composed, inverse, stays
from llmopt.passes.transpose_region import Region, grown, order_of, undoing
from llmopt.passes.transposed import Permuted


@dataclass(frozen=True)
class PushTransposes(Pass):
    """Turn what comes out of operators, and not what goes in, where that turns fewer bytes.

    Numerics: exact; each number is computed of the same ones.
    Scope: the graph: element-wise operators, reductions, softmax, norms of the last axis, products
    with a matrix, Concat, Split, Slice, Gather of places, Expand, and reshapes that part an axis or
    join neighbours. Leaves: every other operator, and operands of sizes that are not known.
    """

    name: ClassVar[str] = "push-transposes"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        before, declined = -1, dict[ir.Node, str]()
        while before < outcome.applied:
            before, declined = outcome.applied, _sweep(program.graph, outcome)
        for node, met in declined.items():
            outcome.miss(node, f"to meet {met!r}, as many bytes would be transposed elsewhere")
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


def _sweep(graph: ir.Graph, outcome: Outcome) -> dict[ir.Node, str]:
    """Push each transpose once; return those that would meet another in vain, and which."""
    declined: dict[ir.Node, str] = {}
    places = _places(graph)
    for node in g.nodes(graph, "Transpose"):
        region = grown(node, places) if node.graph is not None else None
        if region is None:
            continue
        if region.pays:
            _Rewriter(region).rewrite()
            places = _places(graph)
            outcome.hit()
        elif region.reached:
            declined[node] = region.reached
    return declined


def _places(graph: ir.Graph) -> dict[ir.Node, int]:
    return {node: position for position, node in enumerate(graph)}


class _Rewriter:
    """Computes on turned operands what a region computes.

    Args:
        region: Region to rewrite.
    """

    def __init__(self, region: Region) -> None:
        self._region = region
        self._beside: dict[tuple[ir.Value, Order], ir.Value] = {}
        # each value as it is before it is turned
        self._made = {region.start.outputs[0]: g.operand(region.start, 0)}

    def rewrite(self) -> None:
        """Put new nodes in the place of the region's."""
        region = self._region
        for node, change in region.steps.items():
            self._again(node, change)
        entries = [
            first
            for node, change in region.steps.items()
            for index in change.operands
            if (first := g.producer(node.inputs[index], "Transpose")) is not None
        ]
        turns = [turn for value in region.orders for turn in self._leave(value)]
        gone = [*turns, *reversed(region.steps), *dict.fromkeys(entries), region.start]
        for node in gone:
            _discard(node)

    def _again(self, node: ir.Node, change: Permuted) -> None:
        """Write an operator on turned operands."""
        build = g.Builder(node)
        inputs = list(node.inputs)
        for index, order in change.operands.items():
            value = g.operand(node, index)
            made = self._made.get(value)
            inputs[index] = self._operand(build, value, order) if made is None else made
        for index, numbers in change.numbers.items():
            inputs += [None] * (index + 1 - len(inputs))
            inputs[index] = build.constant(list(numbers), "int64")
        attributes = change.attributes(node)
        outputs = build.ops(
            node.op_type, inputs, attributes, outputs=len(node.outputs), name=node.name
        )
        for old, new in zip(node.outputs, outputs, strict=True):
            sizes = g.shape(old)
            if sizes is not None:
                new.shape = shape_of([sizes[axis] for axis in inverse(change.result)])
            new.type = old.type
            self._made[old] = new

    def _operand(self, build: g.Builder, value: ir.Value, order: Order) -> ir.Value:
        """Return what ``value`` is turned from by ``order``."""
        key = value, order
        if key not in self._beside:
            first = g.producer(value, "Transpose")
            source = value if first is None else g.operand(first, 0)
            self._beside[key] = _turn(build, source, undoing(value, order))
        return self._beside[key]

    def _leave(self, value: ir.Value) -> list[ir.Node]:
        """Give ``value`` to those who read it outside; return the transposes that are not read."""
        region, node = self._region, value.producer()
        order, (turns, read) = region.orders[value], region.readers(value)
        for turn in turns:
            both = composed(order, order_of(turn, len(order)))
            new = _turn(g.Builder(turn), self._made[value], both)
            g.replace(turn.outputs[0], new)
        if read and node is not None and node is not region.start:
            new = _turn(g.Builder(node), self._made[value], order)
            for use in list(value.uses()):
                if use.node not in region.steps and use.node not in turns:
                    use.node.replace_input_with(use.idx, new)
            if value.is_graph_output():
                g.replace_output(value, new)
        return turns


def _turn(build: g.Builder, value: ir.Value, order: Order) -> ir.Value:
    """Return ``value`` transposed; what holds the same numbers in the same order is reshaped."""
    if list(order) == sorted(order):
        return value
    sizes = g.shape(value) or []
    after = [sizes[axis] for axis in order] if sizes else []
    tensor = g.weight(value)
    if tensor is not None:
        permuted = weights.transposed(tensor, order)
        return g.add_initializer(build.graph, f"{value.name}.transpose", permuted)
    target = reshape_target(sizes, after) if sizes and stays(sizes, order) else None
    out = _moved(build, value, order, target)
    out.shape, out.type = (shape_of(after) if sizes else None), value.type
    return out


def _moved(
    build: g.Builder, value: ir.Value, order: Order, target: Sequence[int] | None
) -> ir.Value:
    if target is None:
        return build.op("Transpose", [value], {"perm": list(order)})
    return build.op("Reshape", [value, build.constant(list(target), "int64")])


def _discard(node: ir.Node) -> None:
    """Remove a node that nothing reads any more."""
    read = any(out.uses() or out.is_graph_output() for out in node.outputs)
    if not read and node.graph is not None:
        node.graph.remove(node, safe=True)
