"""Lower weights in 4 bits to the signed codes that TensorRT multiplies by.

Rewrites::

    DequantizeLinear(uint4 codes, scale, 8)    into    DequantizeLinear(int4 codes - 8, scale)
    Gather(DequantizeLinear(codes), ids)       into    Gather(table, ids)

TensorRT supports int4 without zero points and with positive scales only. Its Gather has no int4: an
embedding is stored dequantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass
from llmopt.quantization.lazy import QuantizedPart, QuantizedWeight
from llmopt.quantization.numerics import fake_quantize
from llmopt.quantization.packing import unpack


@dataclass(frozen=True)
class Int4Weights(Pass):
    """Store 4-bit codes as signed int4.

    Numerics: exact.
    Scope: the graph. Leaves: DequantizeLinear whose codes are not from ``quantize-weights``
    with ``w4{positive=true}``.
    """

    name: ClassVar[str] = "int4-weights"
    lowers: ClassVar[bool] = True

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in g.nodes(program.graph, "DequantizeLinear"):
            part = g.weight(node.inputs[0])
            if not isinstance(part, QuantizedPart) or part.which != "codes":
                continue
            if part.of.scheme.bits != 4 or not part.of.scheme.positive:
                outcome.miss(node, f"its codes are {part.of.scheme}, not w4 of positive scales")
                continue
            _gather_numbers(node, part.of)
            _sign(node, part.of)
            outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


def _sign(node: ir.Node, weight: QuantizedWeight) -> None:
    """Give a DequantizeLinear signed codes and no zero point."""
    build = g.Builder(node)
    shape = (weight.rows, weight.scheme.padded(weight.columns))

    def read() -> npt.NDArray[Any]:
        return (unpack(weight.packed()).codes.astype(np.int8) - 8).astype(ml_dtypes.int4)

    signed = QuantizedPart(weight, "int4", read, ir.DataType.INT4, shape)
    codes = build.initializer(f"{g.operand(node, 0).name}.int4", signed)
    attributes = {"axis": 1, "block_size": weight.scheme.block}
    old = node.outputs[0]
    inputs = [codes, g.operand(node, 1)]
    new = build.op("DequantizeLinear", inputs, attributes, name=node.name)
    g.replace(old, new)


def _gather_numbers(node: ir.Node, weight: QuantizedWeight) -> None:
    """Let embeddings gather rows of the dequantized table."""
    rows = node.outputs[0]
    tables = [rows, *(cut.outputs[0] for cut in g.users(rows) if g.is_op(cut, "Slice"))]
    readers = [(table, user) for table in tables for user in g.users(table)]
    gathers = [user for table, user in readers if g.is_op(user, "Gather")]
    if not gathers:
        return
    scheme = weight.scheme
    numbers = weights.Derived(
        f"as-{scheme}",
        [weight.base],
        lambda array: fake_quantize(array, scheme),
        ir.DataType.FLOAT,
        [weight.rows, weight.columns],
    )
    stem = str(g.operand(node, 0).name).removesuffix(".codes")
    table = g.Builder(node).initializer(f"{stem}.numbers", numbers)
    for gather in gathers:
        gather.replace_input_with(0, table)
