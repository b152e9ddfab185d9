"""Spell a sum divided by its count as a mean."""

from dataclasses import dataclass
from typing import ClassVar

from llmopt import Outcome, Pass, Program
from llmopt.ir import graph as g


@dataclass(frozen=True)
class FuseMeans(Pass):
    """Rewrite ``ReduceSum(x, -1) / n`` into ``ReduceMean(x, -1)``. Numerics: 1e-6 relative."""

    name: ClassVar[str] = "fuse-means"

    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for division in g.nodes(program.graph, "Div"):
            total, count = g.producer(division.inputs[0], "ReduceSum"), g.scalar(division.inputs[1])
            if total is None or count is None:
                continue
            if g.ints(total.inputs[1]) != [-1] or g.static(total.inputs[0], -1) != count:
                outcome.miss(division, f"{count:g} is not the length of the axis", "norm")
                continue
            mean = g.Builder(division).op("ReduceMean", list(total.inputs), {"keepdims": 1})
            g.replace(division.outputs[0], mean)
            outcome.hit()
        g.remove_dead(program.model)
        return outcome
