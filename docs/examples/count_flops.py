"""Count what each layer multiplies."""

import math
import re
from collections import Counter
from typing import ClassVar

from llmopt import Outcome, Pass, Program
from llmopt.ir import graph as g


class CountFlops(Pass):
    """Note the floating-point operations of each layer's weights, for one token."""

    name: ClassVar[str] = "count-flops"

    def run(self, program: Program) -> Outcome:
        outcome, flops = Outcome(), Counter[str]()
        for node in g.nodes(program.graph, "MatMul"):
            layer = re.match(r"(.*?\d+)[./]", str(node.name))
            if (weight := g.weight(node.inputs[1])) is not None:
                where = layer[1] if layer else "outside of layers"
                flops[where] += 2 * math.prod(weight.shape.numpy())
        for where, count in flops.items():
            outcome.note(f"{where}: {count:,} a token")
        return outcome
