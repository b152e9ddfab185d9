"""Compute what depends on weights alone when the artifact is written, not when it runs.

Rewrites::

    MatMul(x, Transpose(W))       into    MatMul(x, W') with W' read from W and transposed
    MatMul(x, Split<0>(W)[i])     into    MatMul(x, W') with W' read from W and cut out

Nothing is read here: the folded weight is a recipe (``ir/weights.py``) that remembers W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass


@dataclass(frozen=True)
class FoldWeights(Pass):
    """Turn transposes, casts, concatenations and parts of weights into weights.

    Numerics: exact, but for a cast to a narrower type, which rounds as the graph would.
    Scope: the graph. Leaves: any other operator on weights.
    """

    name: ClassVar[str] = "fold-weights"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        made: dict[object, ir.Value] = {}
        for node in g.nodes(program.graph, "Transpose", "Cast", "Concat", "Split"):
            known = [g.weight(value) for value in node.inputs[: _OPERANDS.get(node.op_type)]]
            tensors = [tensor for tensor in known if tensor is not None]
            if len(tensors) < len(known) or any(out.is_graph_output() for out in node.outputs):
                continue
            folded = _fold(node, tensors)
            if not folded:
                continue
            for out, tensor in zip(node.outputs, folded, strict=True):
                out.replace_all_uses_with(_value(program.graph, node, tensor, made))
            outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


_OPERANDS: Final = {"Split": 1}  # what a Split is cut by is no weight


def _value(
    graph: ir.Graph, node: ir.Node, tensor: ir.TensorProtocol, folded: dict[object, ir.Value]
) -> ir.Value:
    """Return the initializer of a folded weight; a transpose or cast of nothing is its operand."""
    if tensor is g.weight(node.inputs[0]):
        return g.operand(node, 0)
    key = weights.identity(tensor)
    if key not in folded:
        folded[key] = g.add_initializer(graph, _name(node, tensor), tensor)
    return folded[key]


def _fold(node: ir.Node, tensors: list[ir.TensorProtocol]) -> list[ir.TensorProtocol]:
    if node.op_type == "Transpose":
        return [weights.transposed(tensors[0], g.attribute(node, "perm", None))]
    if node.op_type == "Cast":
        return [weights.cast(tensors[0], ir.DataType(g.attribute(node, "to", 0)))]
    rank = len(tensors[0].shape)
    axis = g.attribute(node, "axis", 0) % rank
    if node.op_type == "Concat":
        return [weights.concatenated(tensors, axis)]
    sizes = [g.static(out, axis) for out in node.outputs]
    known = [size for size in sizes if size is not None]
    whole = len(known) == len(sizes) and sum(known) == tensors[0].shape.numpy()[axis]
    return weights.split(tensors[0], known, axis) if whole else []


def _name(node: ir.Node, folded: ir.TensorProtocol) -> str:
    sources = [leaf.source for leaf in weights.leaves(folded)]
    stem = sources[0] if sources else str(node.outputs[0].name)
    return f"{stem}.{node.op_type.lower()}"
