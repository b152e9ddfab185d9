"""Compose transposes with the ones that feed them, and drop those that come to nothing.

Rewrites::

    Transpose<p>(Transpose<q>(x))                          into    Transpose<p.q>(x), or x
    Reshape(Transpose<0,2,1,3>(Transpose<0,2,1,3>(x)))     into    Reshape(x)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass


@dataclass(frozen=True)
class CancelTransposes(Pass):
    """Let a transpose read past the transposes that feed it.

    Numerics: exact; every element ends where it was.
    Scope: the graph. Leaves: a pair that ends in a graph output, whose name is the interface,
    and a default ``perm`` on a value of unknown rank.
    """

    name: ClassVar[str] = "cancel-transposes"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in g.nodes(program.graph, "Transpose"):
            first = g.producer(node.inputs[0], "Transpose")
            perm = _perm(node)
            if perm is None:
                outcome.miss(node, "default perm on a value of unknown rank")
            elif first is not None and (inner := _perm(first)) is not None:
                self._compose(node, first, [inner[axis] for axis in perm], outcome)
            elif perm == sorted(perm) and not node.outputs[0].is_graph_output():
                g.replace(node.outputs[0], g.operand(node, 0))
                outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome

    @staticmethod
    def _compose(node: ir.Node, first: ir.Node, perm: list[int], outcome: Outcome) -> None:
        source = g.operand(first, 0)
        if perm != sorted(perm):
            node.replace_input_with(0, source)
            node.attributes["perm"] = ir.AttrInt64s("perm", perm)
        elif node.outputs[0].is_graph_output():
            outcome.miss(node, "its result is a graph output")
            return
        else:
            g.replace(node.outputs[0], source)
        outcome.hit()


def _perm(node: ir.Node) -> list[int] | None:
    given = g.attribute(node, "perm", None)
    if given is not None:
        return [int(axis) for axis in given]
    rank = g.rank(node.inputs[0])
    return None if rank is None else list(range(rank))[::-1]
