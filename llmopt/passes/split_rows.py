"""Compute rows on [batch, tokens, ...] where they are on [batch * tokens, ...].

Rewrites::

    Reshape(MatMul(Reshape(x), W) + b)    into    MatMul(x, W) + b

with ``x`` [B, S, E], its reshape to [B * S, E] and the outer one back to [B, S, F].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.ir.sizes import known, shape_of, spelled, symbols_of
from llmopt.ir.traits import ELEMENTWISE
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.canonicalize import reshape_target


@dataclass(frozen=True)
class SplitRows(Pass):
    """Leave out the reshape to rows in front of products with weights, and the one behind them.

    Numerics: exact. Scope: the graph: products with a matrix, norms, and what is computed number by
    number of one operand and of vectors. Leaves: rows that something else reads, those that are not
    put back to the batch and tokens that they were; silently, those of sizes that no input tells.
    """

    name: ClassVar[str] = "split-rows"

    @override
    def run(self, program: Program) -> Outcome:
        outcome, symbols = Outcome(), symbols_of(program.graph)
        for node in g.nodes(program.graph, "Reshape"):
            width = g.static(node.outputs[0], 1)
            if g.rank(node.outputs[0]) != 2 or width is None:
                continue
            for reader in g.users(node.outputs[0]):
                path = _path(node.outputs[0], reader)
                if not path or (g.rank(path[-1].outputs[0]) or 0) < 3:
                    continue
                reason = _split(node, path, width)
                if reason is None:
                    outcome.hit()
                elif known(g.shape(path[-1].outputs[0]), symbols):
                    outcome.miss(path[-1], reason)
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


def _path(rows: ir.Value, reader: ir.Node) -> list[ir.Node]:
    """Return what computes row by row, from ``reader`` on to a Reshape; nothing if none is met."""
    path = [reader]
    while not g.is_op(path[-1], "Reshape"):
        if not _by_row(path[-1], rows):
            return []
        rows = path[-1].outputs[0]
        following = g.sole_user(rows)
        if following is None:
            return []
        path.append(following)
    return path if len(path) > 1 else []


def _by_row(node: ir.Node, rows: ir.Value) -> bool:
    """Whether ``node`` computes each row of its result of one of ``rows``, and nothing else."""
    others = [value for value in node.inputs if value is not None and value is not rows]
    if len(others) + 1 != sum(value is not None for value in node.inputs):
        return False
    if g.rank(node.outputs[0]) != 2 or any(out.uses() for out in node.outputs[1:]):
        return False
    if g.is_op(node, "MatMul"):
        return node.inputs[0] is rows and g.rank(others[0]) == 2
    if g.is_op(node, "LayerNormalization", "RMSNormalization", "Softmax"):
        return node.inputs[0] is rows and g.attribute(node, "axis", -1) in (-1, 1)
    return g.is_op(node, *ELEMENTWISE) and all(g.rank(v) in (0, 1) for v in others)


def _split(node: ir.Node, path: list[ir.Node], width: int) -> str | None:
    """Let ``path`` compute on the axes that ``node`` joins; return why not, if not."""
    *steps, last = path
    source, end = g.operand(node, 0), steps[-1].outputs[0]
    before, after, last_width = g.shape(source), g.shape(last.outputs[0]), g.static(end, 1)
    outer = _outer(after or [], last_width or 0)
    if before is None or after is None or outer is None or last_width is None:
        return (
            f"its rows are {spelled(before or ())} joined, and put back as {spelled(after or ())}"
        )
    first = reshape_target(before, [*outer, width])
    target = reshape_target([*outer, last_width], after)
    if first is None or target is None:
        return f"no constant says that rows of {spelled(before)} are put back as {spelled(after)}"
    build = g.Builder(steps[0])
    x = source
    if before != [*outer, width]:
        sizes = build.constant(first, "int64")
        x = build.op("Reshape", [source, sizes], like=source, shape=shape_of([*outer, width]))
    steps[0].replace_input_with(list(steps[0].inputs).index(node.outputs[0]), x)
    for step in steps:
        step.outputs[0].shape = shape_of([*outer, *(g.shape(step.outputs[0]) or [])[1:]])
    if after == [*outer, last_width]:
        g.replace(last.outputs[0], end)
    else:
        last.replace_input_with(1, g.Builder(last).constant(target, "int64"))
        last.attributes.pop("allowzero", None)
    return None


def _outer(sizes: list[g.Dim], width: int) -> list[g.Dim] | None:
    """Return the axes in front of those that rows of ``width`` are parted into.

    >>> _outer(["S", "B", 4, 8], 32)
    ['S', 'B']
    """
    for count in range(1, len(sizes) - 1):
        inner = sizes[-count:]
        numbers = [size for size in inner if isinstance(size, int)]
        if len(numbers) == count and math.prod(numbers) == width:
            return sizes[:-count]
    return None
