"""Quantize weights per output channel and activations per token, as standard Q/DQ.

Rewrites::

    MatMul(x, W)    into    Mul(MatMul(DequantizeLinear(QuantizeLinear(x / m)),
                                       DequantizeLinear(codes, scale)), m)

with ``m`` [.., S, 1] the largest magnitude of each token. A token's scale depends on that token
alone, so a sentence's result does not depend on the others in its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.quantize_weights import SHORTEST, candidates, leaf_turns
from llmopt.quantization.dynamic import (
    ACTIVATION_LIMIT,
    ACTIVATION_ZERO,
    dequantize_columns,
    quantize_columns,
)

Array = npt.NDArray[Any]
TINY: Final = 1e-30  # the magnitude of a token of zeros


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Round projections to int8, weights once and activations when they arrive.

    Numerics: each weight moves by at most half its channel's scale, each activation by at most
    its token's largest magnitude / 254; what that does to the outputs is measured, not bounded.
    Scope: MatMul of a [.., S, K] value with a matrix of weights.
    Leaves: the embedding, and matrices with fewer than 16 inputs.

    Args:
        limit: The largest code of a weight. 64 keeps the sum of two products within 16 bits,
            where processors without VNNI saturate; 127 is finer and right on VNNI and arm.
    """

    name: ClassVar[str] = "quantize-dynamic"
    limit: int = 64

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for node, value, base in list(candidates(program)):
            if not g.is_op(node, "MatMul"):
                continue
            if base.shape.numpy()[1] < SHORTEST:
                reason = f"its weight has {base.shape[1]} inputs, fewer than {SHORTEST}"
                outcome.miss(node, reason)
                continue
            self._quantize(node, value, rounded)
            outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome

    def _quantize(
        self, node: ir.Node, value: ir.Value, rounded: dict[ir.Value, tuple[ir.Value, ir.Value]]
    ) -> None:
        x = g.operand(node, 0)
        if x not in rounded:
            rounded[x] = _activations(g.Builder(node), x)
        build = g.Builder(node)
        activations, largest = rounded[x]
        product = build.op("MatMul", [activations, self._weight(build, value)], name=node.name)
        product.shape, product.type = node.outputs[0].shape, node.outputs[0].type
        out = build.op("Mul", [product, largest])
        g.replace(node.outputs[0], out)

    def _weight(self, build: g.Builder, value: ir.Value) -> ir.Value:
        tensor = g.weight(value)
        assert tensor is not None
        limit = self.limit
        shape = list(tensor.shape.numpy())
        codes = weights.Derived(
            f"int8-codes-{limit}",
            [tensor],
            lambda w: quantize_columns(w, limit).codes,
            ir.DataType.INT8,
            shape,
        )
        scale = weights.Derived(
            f"int8-scale-{limit}",
            [tensor],
            lambda w: quantize_columns(w, limit).scale,
            ir.DataType.FLOAT,
            shape[1:],
        )
        stem = str(value.name).removesuffix(".transpose")
        operands = [
            build.initializer(f"{stem}.codes", codes),
            build.initializer(f"{stem}.scale", scale),
        ]
        out = build.op("DequantizeLinear", operands, {"axis": 1})
        out.shape, out.type = value.shape, value.type
        return out


def _activations(build: g.Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return ``x`` rounded, each token divided by its largest magnitude, and that magnitude."""
    sizes = g.shape(x) or []
    size = build.op("Abs", [x])
    axis = build.constant([-1], "int64")
    largest = build.op("ReduceMax", [size, axis], {"keepdims": 1})
    largest = build.op("Max", [largest, build.constant(TINY, "float32")])
    largest.shape, largest.type = ir.Shape([*sizes[:-1], 1]), x.type
    unit = build.op("Div", [x, largest])
    scale = build.constant(1.0 / ACTIVATION_LIMIT, "float32")
    zero = build.constant(ACTIVATION_ZERO, "uint8")
    codes = build.op("QuantizeLinear", [unit, scale, zero])
    codes.shape, codes.type = x.shape, ir.TensorType(ir.DataType.UINT8)
    back = build.op("DequantizeLinear", [codes, scale, zero])
    back.shape, back.type = x.shape, x.type
    return back, largest


def rounding(program: Program, limit: int = QuantizeDynamic.limit) -> Callable[[str, Array], Array]:
    """Return what ``quantize-dynamic`` would do to each parameter: name, value to value."""
    turned: dict[str, bool] = {}
    for node, _, base in candidates(program):
        if g.is_op(node, "MatMul") and base.shape.numpy()[1] >= SHORTEST:
            turned |= dict(leaf_turns(base, turned=False))

    def transform(name: str, array: Array) -> Array:
        if name not in turned:
            return array
        columns = array if turned[name] else array.T
        rounded = dequantize_columns(quantize_columns(np.ascontiguousarray(columns), limit))
        return rounded if turned[name] else rounded.T

    return transform
