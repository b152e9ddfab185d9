"""Spell what exporters emit in the one way of the dialect.

Rewrites::

    Identity(x), Dropout(x), Cast(x) to its own type     into    x
    Gemm(x, W, b)                                        into    Add(MatMul(x, W), b)
    Reshape(x, Concat(batch, tokens, 4, 8))              into    Reshape(x, [0, 0, 4, 8])
    Reshape(Reshape(x)), Reshape to the same shape       into    one Reshape, or none
    Flatten(x)                                           into    Reshape(x, [-1, 8])
    GatherND(x, Unsqueeze(i, -1))                        into    Gather<0>(x, i)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Spell identities, affine maps and reshapes in the one way of the dialect.

    Numerics: exact, but for Gemm, whose product and sum are rounded apart.
    Scope: the graph. Leaves: a Gemm with factors other than 1, a Reshape whose sizes are not
    known from its input.
    """

    name: ClassVar[str] = "canonicalize"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in list(program.graph):
            rewrite = _REWRITES.get(node.op_type) if node.domain == "" else None
            if rewrite is None or node.graph is None:
                continue
            new = rewrite(node)
            if new is not None:
                if new is not node.outputs[0]:
                    g.replace(node.outputs[0], new)
                outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


def _identity(node: ir.Node) -> ir.Value | None:
    return _instead(node.outputs[0], g.operand(node, 0))


def _instead(out: ir.Value, x: ir.Value) -> ir.Value | None:
    """Return ``x`` if it can stand for ``out``: it cannot give up a name of its own."""
    named = x.is_graph_input() or x.is_graph_output() or x.is_initializer()
    return None if out.is_graph_output() and named else x


def _dropout(node: ir.Node) -> ir.Value | None:
    training = g.optional(node, 2)
    if training is not None and g.scalar(training) != 0.0:
        return None
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        return None  # the mask of what was dropped
    return _identity(node)


def _cast(node: ir.Node) -> ir.Value | None:
    x = g.operand(node, 0)
    return _identity(node) if x.dtype == ir.DataType(g.attribute(node, "to", 0)) else None


def _gather_nd(node: ir.Node) -> ir.Value | None:
    x, places = g.operand(node, 0), g.operand(node, 1)
    depth, sizes = g.rank(x), g.shape(places)
    if not depth or not sizes or sizes[-1] != 1 or g.attribute(node, "batch_dims", 0):
        return None
    build, known = g.Builder(node), g.constant(places)
    if known is not None:
        index = build.constant(known[..., 0])
    else:
        index = build.op(
            "Squeeze",
            [places, build.constant([-1], "int64")],
            like=places,
            shape=ir.Shape(list(places.shape or ())[:-1]),
        )
    return build.op("Gather", [x, index], {"axis": 0}, name=node.name)


def _gemm(node: ir.Node) -> ir.Value | None:
    if g.attribute(node, "alpha", 1.0) != 1.0 or g.attribute(node, "beta", 1.0) != 1.0:
        return None
    build = g.Builder(node)
    operands = []
    for index, flag in enumerate(("transA", "transB")):
        value = g.operand(node, index)
        if g.attribute(node, flag, 0):
            turned = build.op("Transpose", [value], {"perm": [1, 0]})
            sizes = g.shape(value)
            turned.shape = ir.Shape(sizes[::-1]) if sizes else None
            turned.type = value.type
            value = turned
        operands.append(value)
    out = build.op("MatMul", operands, like=node.outputs[0])
    bias = g.optional(node, 2)
    return out if bias is None else build.op("Add", [out, bias])


def _reshape(node: ir.Node) -> ir.Value | None:
    x, out = g.operand(node, 0), node.outputs[0]
    before, after = g.shape(x), g.shape(out)
    if before is None or after is None:
        return None
    if before == after and (copy := _instead(out, x)) is not None:
        return copy
    inner = g.producer(x, "Reshape")
    source = g.operand(inner, 0) if inner is not None else x
    if g.shape(source) == after and (copy := _instead(out, source)) is not None:
        return copy
    target = reshape_target(g.shape(source) or [], after)
    if target is None:
        source, target = x, reshape_target(before, after)
    current = g.ints(node.inputs[1])
    if target is None or (source is x and target == current):
        return None
    node.replace_input_with(0, source)
    node.replace_input_with(1, g.Builder(node).constant(target, "int64"))
    node.attributes.pop("allowzero", None)
    return out


def _flatten(node: ir.Node) -> ir.Value | None:
    after = g.shape(node.outputs[0])
    target = reshape_target(g.shape(node.inputs[0]) or [], after or [])
    if target is None or not after:
        return None
    build = g.Builder(node)
    return build.op("Reshape", [node.inputs[0], build.constant(target, "int64")])


def reshape_target(before: list[g.Dim], after: list[g.Dim]) -> list[int] | None:
    """Return the constant target of a Reshape between these sizes, if there is one.

    A symbol that stays where it is becomes 0, and one that moves becomes -1, if it is alone.

    >>> reshape_target(["B", "S", 32], ["B", "S", 4, 8])
    [0, 0, 4, 8]
    """
    target = [
        size
        if isinstance(size, int)
        else (0 if index < len(before) and before[index] == size else -1)
        for index, size in enumerate(after)
    ]
    if 0 in after:  # an empty tensor: 0 would be read as "the same size as before"
        return None
    return target if target.count(-1) <= 1 else None


_REWRITES: Final[Mapping[str, Callable[[ir.Node], ir.Value | None]]] = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    "Flatten": _flatten,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "Reshape": _reshape,
}
