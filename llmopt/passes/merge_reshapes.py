"""Let a chain of operators that only move numbers be as short as it can be.

Rewrites::

    Reshape(Squeeze(Unsqueeze(Flatten(x))))             into    Reshape(x)
    Reshape(Transpose(Reshape(x)))                      into    Transpose(x), where it does that
    Transpose<0,2,1,3>(x), with x [B, 1, S, D]          into    Reshape(x)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.ir.sizes import known, shape_of, spelled, symbols_of
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.canonicalize import reshape_target
from llmopt.passes.movements import Movement, MovementStep

_MOVES: Final = ("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True)
class MergeReshapes(Pass):
    """Write reshapes and transposes that follow one another as one of each, or fewer.

    A value that something else reads stays, and the chain goes past it. Fewer transposes count
    more than fewer reshapes, which move no bytes.

    Numerics: exact; every element ends where it was.
    Scope: the graph. Leaves: chains whose sizes do not say what is joined and parted, and reshapes
    to sizes that only a computation gives; silently, those of sizes that no input tells.
    """

    name: ClassVar[str] = "merge-reshapes"

    @override
    def run(self, program: Program) -> Outcome:
        outcome, symbols, before = Outcome(), symbols_of(program.graph), -1
        while before < outcome.applied:  # what one chain becomes may be part of another
            before = outcome.applied
            outcome.missed.clear()
            for node in reversed(g.nodes(program.graph, *_MOVES)):
                if node.graph is not None:  # else it went with a chain
                    _shorten(node, outcome, symbols)
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


def _shorten(node: ir.Node, outcome: Outcome, symbols: set[str]) -> None:
    """Replace the longest chain that ends in ``node`` and can be shorter."""
    chain = _chain(node)
    gone = _alone(chain)
    reason = ""
    for length in range(len(chain), 0, -1):
        part = chain[:length]
        movement = _movement(part[::-1])
        if isinstance(movement, str):
            reason = reason or movement
            continue
        source = g.operand(part[-1], 0)
        spent = _cost([each.op_type for each in part[: min(length, gone)]])
        for plan in movement.plans():
            if _cost([_operator(step) for step in plan]) >= spent:
                break
            if not plan and node.outputs[0].is_graph_output() and _named(source):
                reason = "its result is a graph output, which keeps its name"
            elif _written(plan, node, source):
                _discard(part)
                outcome.hit()
                return
            else:
                reason = reason or f"no constant says the sizes {spelled(movement.after)}"
    sizes = [g.shape(value) for each in chain for value in (each.inputs[0], each.outputs[0])]
    if reason and not _continues(node) and all(known(each, symbols) for each in sizes):
        outcome.miss(node, reason)


def _chain(node: ir.Node) -> list[ir.Node]:
    """Return ``node`` and what moves its operand, the last first."""
    chain = [node]
    while (before := g.producer(chain[-1].inputs[0], *_MOVES)) is not None:
        chain.append(before)
    return chain


def _continues(node: ir.Node) -> bool:
    return any(g.is_op(reader, *_MOVES) for reader in g.users(node.outputs[0]))


def _alone(chain: Sequence[ir.Node]) -> int:
    """Return how many nodes of a chain nothing else reads: they go with its last one."""
    for count, node in enumerate(chain[1:], 1):
        if g.sole_user(node.outputs[0]) is None:
            return count
    return len(chain)


def _movement(chain: Sequence[ir.Node]) -> Movement | str:
    """Return what a chain does, or why it is not known."""
    sizes = g.shape(chain[0].inputs[0])
    if sizes is None:
        return f"the sizes of {g.operand(chain[0], 0).name!r} are not known"
    movement = Movement.start(sizes)
    for node in chain:
        after = g.shape(node.outputs[0])
        if after is None:
            return f"the sizes of {node.outputs[0].name!r} are not known"
        if node.op_type == "Transpose":
            order = g.attribute(node, "perm", None) or range(len(after))[::-1]
            movement = movement.transposed(order)
            continue
        reshaped = movement.reshaped(after)
        if reshaped is None:
            return f"{node.name!r} makes {spelled(after)} of {spelled(movement.after)}"
        movement = reshaped
    return movement


def _operator(step: MovementStep) -> str:
    return "Transpose" if step.order else "Reshape"


def _cost(op_types: Sequence[str]) -> tuple[int, int]:
    turns = sum(op_type == "Transpose" for op_type in op_types)
    return turns, len(op_types) - turns


def _named(value: ir.Value) -> bool:
    """Whether a value cannot take the name of an output."""
    return value.is_graph_input() or value.is_graph_output() or value.is_initializer()


def _written(plan: Sequence[MovementStep], node: ir.Node, source: ir.Value) -> bool:
    """Put a chain in the place of ``node``'s result; say whether it could be written."""
    before = [g.shape(source) or [], *([*step.sizes] for step in plan)]
    targets = [
        None if step.order else reshape_target(sizes, [*step.sizes])
        for sizes, step in zip(before, plan, strict=False)
    ]
    if any(not step.order and target is None for step, target in zip(plan, targets, strict=True)):
        return False
    build, value = g.Builder(node), source
    for step, target in zip(plan, targets, strict=True):
        if step.order:
            value = build.op("Transpose", [value], {"perm": list(step.order)})
        else:
            value = build.op("Reshape", [value, build.constant(target or [], "int64")])
        value.shape, value.type = shape_of(step.sizes), source.type
    if plan:
        made = value.producer()
        assert made is not None
        made.name = node.name
    g.replace(node.outputs[0], value)
    return True


def _discard(chain: Sequence[ir.Node]) -> None:
    """Remove the nodes of a chain that nothing reads any more, the last first."""
    for node in chain:
        out, graph = node.outputs[0], node.graph
        if out.uses() or out.is_graph_output() or graph is None:
            return
        graph.remove(node, safe=True)
