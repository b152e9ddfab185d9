"""Compute what depends on weights alone when the artifact is written, not when it runs.

Rewrites::

    MatMul(x, Transpose(W))    into    MatMul(x, W') with W' read from W and transposed

Nothing is read here: the folded weight is a recipe (``ir/weights.py``) that remembers W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass


@dataclass(frozen=True)
class FoldWeights(Pass):
    """Turn transposes, casts and concatenations of weights into weights.

    Numerics: exact, but for a cast to a narrower type, which rounds as the graph would.
    Scope: the graph. Leaves: any other operator on weights.
    """

    name: ClassVar[str] = "fold-weights"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        made: dict[object, ir.Value] = {}
        for node in g.nodes(program.graph, "Transpose", "Cast", "Concat"):
            tensors = [g.weight(value) for value in node.inputs]
            if node.outputs[0].is_graph_output() or not all(tensors):
                continue
            folded = _fold(node, [t for t in tensors if t is not None])
            if folded is tensors[0]:  # a transpose or cast of nothing
                node.outputs[0].replace_all_uses_with(g.operand(node, 0))
                outcome.hit()
                continue
            key = weights.identity(folded)
            if key not in made:
                made[key] = g.add_initializer(program.graph, _name(node, folded), folded)
            node.outputs[0].replace_all_uses_with(made[key])
            outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


def _fold(node: ir.Node, tensors: list[ir.TensorProtocol]) -> ir.TensorProtocol:
    if node.op_type == "Transpose":
        return weights.transposed(tensors[0], g.attribute(node, "perm", None))
    if node.op_type == "Cast":
        return weights.cast(tensors[0], ir.DataType(g.attribute(node, "to", 0)))
    rank = len(tensors[0].shape)
    return weights.concatenated(tensors, g.attribute(node, "axis", 0) % rank)


def _name(node: ir.Node, folded: ir.TensorProtocol) -> str:
    sources = [leaf.source for leaf in weights.leaves(folded)]
    stem = sources[0] if sources else str(node.outputs[0].name)
    return f"{stem}.{node.op_type.lower()}"
