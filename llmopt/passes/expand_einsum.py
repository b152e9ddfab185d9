"""Write a product of two activations as MatMul.

Rewrites::

    Einsum(q, k) "bqhd,bkhd->bhqk"    into    MatMul(Transpose(q), Transpose(k))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass


@dataclass(frozen=True)
class ExpandEinsum(Pass):
    """Write Einsum of two activations as MatMul between transposes.

    Of two ways to order the result the one is taken that turns the smaller tensors, so that
    scores of attention stay as they are and are recognized.

    Numerics: the same sums.
    Scope: the graph. Leaves: products with a weight, sums over several axes, diagonals, ellipses
    and operands of unknown rank.
    """

    name: ClassVar[str] = "expand-einsum"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in g.nodes(program.graph, "Einsum"):
            plan = _plan(node)
            if isinstance(plan, str):
                outcome.miss(node, plan)
            else:
                _expand(node, plan)
                outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


@dataclass(frozen=True)
class _MatMulPlan:
    """How an Einsum is a MatMul.

    Args:
        labels: Labels of each operand, one letter an axis.
        out: Labels of the result.
        orders: Axis orders of the operands and of the product in the MatMul.
    """

    labels: tuple[str, str]
    out: str
    orders: tuple[str, str, str]


def _plan(node: ir.Node) -> _MatMulPlan | str:
    """Return the MatMul that ``node`` is, or why it is not one."""
    equation = str(g.attribute(node, "equation", "")).replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    labels = inputs.split(",")
    if len(labels) != 2 or not arrow or not all(map(_distinct, (*labels, out))):
        return f"{equation!r} is no product of two operands"
    left, right = labels
    if any(x is None or x.is_initializer() or g.rank(x) is None for x in node.inputs):
        return "an operand is a weight, or of unknown rank"
    summed = [label for label in left if label in right and label not in out]
    kept = set(left + right) - set(summed)
    rows = [label for label in left if label not in right]
    columns = [label for label in right if label not in left]
    if len(summed) != 1 or kept != set(out) or not rows or not columns:
        return f"{equation!r} sums over {summed or 'nothing'}, or has no rows and columns"
    ways = [_way((left, right), out, (row, columns[-1], summed[0])) for row in dict.fromkeys(rows)]
    return min(ways, key=lambda way: _turned(node, way))


def _distinct(labels: str) -> bool:
    return labels.isalpha() and len(set(labels)) == len(labels)


def _way(labels: tuple[str, str], out: str, chosen: tuple[str, str, str]) -> _MatMulPlan:
    row, column, summed = chosen
    batch = "".join(label for label in out if label not in (row, column))
    return _MatMulPlan(
        labels, out, (batch + row + summed, batch + summed + column, batch + row + column)
    )


def _turned(node: ir.Node, way: _MatMulPlan) -> int:
    """Return how many free dimensions the values have that would be transposed."""
    values = (*node.inputs, node.outputs[0])
    total = 0
    for value, labels, order in zip(values, (*way.labels, way.out), way.orders, strict=True):
        if labels != "".join(label for label in order if label in labels):
            total += sum(not isinstance(dim, int) for dim in g.shape(value) or ())
    return total


def _expand(node: ir.Node, plan: _MatMulPlan) -> None:
    build = g.Builder(node)
    operands = [
        _arranged(build, g.operand(node, index), plan.labels[index], plan.orders[index])
        for index in (0, 1)
    ]
    product = build.op("MatMul", operands, name=node.name)
    sizes = g.shape(node.outputs[0]) or []
    found = dict(zip(plan.out, sizes, strict=True))
    product.shape = ir.Shape([found[label] for label in plan.orders[2]])
    product.type = node.outputs[0].type
    g.replace(node.outputs[0], _transposed(build, product, plan.orders[2], plan.out))


def _arranged(build: g.Builder, value: ir.Value, labels: str, order: str) -> ir.Value:
    """Return ``value`` with its axes in this order, of size 1 where it has none."""
    held = "".join(label for label in order if label in labels)
    value = _transposed(build, value, labels, held)
    missing = [place for place, label in enumerate(order) if label not in labels]
    if not missing:
        return value
    sizes: list[g.Dim] = list(g.shape(value) or [])
    for place in missing:
        sizes.insert(place, 1)
    return build.op("Unsqueeze", [value, build.constant(missing, "int64")], like=value, shape=sizes)


def _transposed(build: g.Builder, value: ir.Value, labels: str, order: str) -> ir.Value:
    if labels == order:
        return value
    perm: Sequence[int] = [labels.index(label) for label in order]
    sizes = g.shape(value) or []
    return build.op(
        "Transpose",
        [value],
        {"perm": list(perm)},
        like=value,
        shape=[sizes[place] for place in perm],
    )
