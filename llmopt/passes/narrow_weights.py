"""Keep weights of products in bfloat16, and all else in float32.

Rewrites::

    MatMul(x, W)         into    MatMul(x, Cast<float>(W'))    W' the nearest bfloat16 numbers
    Gather(E, ids)       into    Gather(Cast<float>(E'), ids)

An embedding and the head tied to it share one W'. Backends lower the pattern to kernels that read
half the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from llmopt.interface.arrays import Array
from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome
from llmopt.passes.convert_float import NARROW, WIDE, narrowed
from llmopt.passes.quantize_weights import candidates, sources
from llmopt.passes.rounding import Rounding, RoundingPass

_NARROW: Final = NARROW["bfloat16"]


@dataclass(frozen=True)
class NarrowWeights(RoundingPass):
    """Round the weights of projections and of the token embedding to bfloat16.

    Numerics: each weight is rounded to 8 bits; activations and caches stay float32.
    Scope: MatMul with a matrix of weights; Gather of the token embedding.
    Leaves: other tables, and vectors.
    """

    name: ClassVar[str] = "narrow-weights"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        made: dict[ir.Value, ir.Value] = {}
        for node, value, _ in list(candidates(program)):
            if value.dtype != WIDE:
                outcome.miss(node, f"its weight is {value.dtype}, not float32")
                continue
            if value not in made:
                made[value] = _widened(program.graph, value)
            node.replace_input_with(int(g.is_op(node, "MatMul")), made[value])
            outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome

    @override
    def rounding(self, program: Program, after: Rounding) -> Rounding:
        named = {
            name
            for _, value, base in candidates(program)
            if value.dtype == WIDE
            for name in sources(base)
        }

        def rounded(name: str, array: Array) -> Array:
            if name not in named:
                return after(name, array)
            return array.astype(_NARROW.numpy()).astype(np.float32)

        return rounded


def _widened(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Return the float32 value of a weight that is stored in bfloat16."""
    tensor = g.weight(value)
    assert tensor is not None
    build = g.Builder(graph[0])
    stored = build.initializer(f"{value.name}.bfloat16", narrowed(tensor, _NARROW))
    return build.op("Cast", [stored], {"to": int(WIDE)}, like=value, dtype=WIDE)
