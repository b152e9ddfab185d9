"""Turn halves where neighbours turn: the kernels know one order.

Rewrites::

    RotaryEmbedding(x), interleaved    into    pairs(RotaryEmbedding(halves(x)))

where ``halves`` puts every other number of a head in front, and ``pairs`` puts them back.
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
class SeparatePairs(Pass):
    """Rotate halves of heads where the graph rotates neighbours, and put them back.

    Numerics: exact. Scope: the graph. Leaves: an ``x`` that is not [B, S, H * D].
    """

    name: ClassVar[str] = "separate-pairs"
    lowers: ClassVar[bool] = True

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in g.nodes(program.graph, "RotaryEmbedding"):
            if not g.attribute(node, "interleaved", 0):
                continue
            x, heads = g.operand(node, 0), g.attribute(node, "num_heads", 0)
            width = g.static(x, -1)
            if g.rank(x) != 3 or width is None or not heads or width % (2 * heads):
                outcome.miss(node, f"x is {g.shape(x)} of {heads} heads, not [B, S, H * D]")
                continue
            _separate(node, x, [heads, width // heads // 2])
            outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


def _separate(node: ir.Node, x: ir.Value, sizes: list[int]) -> None:
    heads, half = sizes
    build = g.Builder(node)
    attributes = {n: a.value for n, a in node.attributes.items() if n != "interleaved"}
    halves = _turned(build, x, [heads, half, 2])
    turned = build.op(
        "RotaryEmbedding", [halves, *node.inputs[1:]], attributes, name=node.name, like=x
    )
    g.replace(node.outputs[0], _turned(build, turned, [heads, 2, half]))


def _turned(build: g.Builder, x: ir.Value, split: list[int]) -> ir.Value:
    """Return x [B, S, H * D] with the two inner axes of ``split`` exchanged in every head."""
    outer = (g.shape(x) or [])[:2]
    heads, rows, columns = split
    apart = build.op(
        "Reshape", [x, build.constant([0, 0, *split], "int64")], like=x, shape=[*outer, *split]
    )
    swapped = build.op(
        "Transpose",
        [apart],
        {"perm": [0, 1, 2, 4, 3]},
        like=x,
        shape=[*outer, heads, columns, rows],
    )
    return build.op(
        "Reshape", [swapped, build.constant([0, 0, heads * rows * columns], "int64")], like=x
    )
