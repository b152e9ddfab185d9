"""Quantize weights per output channel and activations per token, as standard Q/DQ.

Rewrites::

    MatMul(x, W)    into    Mul(MatMul(DequantizeLinear(QuantizeLinear(x / m)),
                                       DequantizeLinear(codes, scale)), m)

with ``m`` [.., S, 1] the largest magnitude of each token, and, where E is such a W transposed (a
head tied to the embedding)::

    Gather(E, ids)  into    Mul(Cast(Gather(codes, ids)), Unsqueeze(Gather(scale, ids)))

A token's scale depends on that token
alone, so a sentence's result does not depend on the others in its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from llmopt.interface.arrays import Array
from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome
from llmopt.passes.quantize_weights import SHORTEST, candidates, leaf_turns
from llmopt.passes.rounding import Rounding, RoundingPass
from llmopt.quantization.dynamic import (
    ACTIVATION_LIMIT,
    ACTIVATION_ZERO,
    dequantize_columns,
    quantize_columns,
)

TINY: Final = 1e-30  # the magnitude of a token of zeros


@dataclass(frozen=True)
class QuantizeDynamic(RoundingPass):
    """Round projections to int8, weights once and activations when they arrive.

    Numerics: each weight moves by at most half its channel's scale, each activation by at most
    its token's largest magnitude / 254; what that does to the outputs is measured, not bounded.
    Scope: MatMul of a [.., S, K] value with a matrix of weights.
    Leaves: tables that no product shares, and matrices with fewer than 16 inputs.

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
        found = list(candidates(program))
        shared = {
            weights.identity(base)
            for part in program.whole.parts()  # an embedding may be the head of another component
            for node, _, base in candidates(part)
            if g.is_op(node, "MatMul")
        }
        for node, value, base in found:
            if not g.is_op(node, "MatMul"):
                if weights.identity(base) in shared and base.shape.numpy()[1] >= SHORTEST:
                    self._quantize_rows(node, value, base)
                    outcome.hit()
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

    @override
    def rounding(self, program: Program, after: Rounding) -> Rounding:
        turned: dict[str, bool] = {}
        for node, _, base in candidates(program):
            if g.is_op(node, "MatMul") and base.shape.numpy()[1] >= SHORTEST:
                turned |= dict(leaf_turns(base, transposed=False))

        def rounded(name: str, array: Array) -> Array:
            if name not in turned:
                return after(name, array)
            columns = np.ascontiguousarray(array if turned[name] else array.T)
            values = dequantize_columns(quantize_columns(columns, self.limit))
            return values if turned[name] else values.T

        return rounded

    def _quantize(
        self, node: ir.Node, value: ir.Value, rounded: dict[ir.Value, tuple[ir.Value, ir.Value]]
    ) -> None:
        x = g.operand(node, 0)
        if x not in rounded:
            rounded[x] = _activations(g.Builder(node), x)
        build = g.Builder(node)
        activations, largest = rounded[x]
        product = build.op(
            "MatMul",
            [activations, self._weight(build, value)],
            name=node.name,
            like=node.outputs[0],
        )
        out = build.op("Mul", [product, largest])
        g.replace(node.outputs[0], out)

    def _quantize_rows(self, node: ir.Node, value: ir.Value, base: ir.TensorProtocol) -> None:
        """Look up rows of the table [N, K] as the product with it has them."""
        columns = weights.transposed(base)
        codes, scale = self._codes(columns), self._scale(columns)
        build, out = g.Builder(node), node.outputs[0]
        stem, ids = str(value.name), g.operand(node, 1)
        table = build.initializer(f"{stem}.rows", weights.transposed(codes))
        steps = build.initializer(f"{stem}.rows_scale", scale)
        sizes = list(g.shape(ids) or [])
        rows = build.op(
            "Gather", [table, ids], {"axis": 0}, name=node.name, like=out, dtype=ir.DataType.INT8
        )
        numbers = build.op("Cast", [rows], {"to": ir.DataType.FLOAT}, like=out)
        step = build.op("Gather", [steps, ids], {"axis": 0}, like=ids, dtype=out.dtype)
        step = build.op(
            "Unsqueeze", [step, build.constant([-1], "int64")], like=out, shape=[*sizes, 1]
        )
        g.replace(out, build.op("Mul", [numbers, step]))

    def _weight(self, build: g.Builder, value: ir.Value) -> ir.Value:
        tensor = g.weight(value)
        assert tensor is not None
        stem = str(value.name).removesuffix(".transpose")
        operands = [
            build.initializer(f"{stem}.codes", self._codes(tensor)),
            build.initializer(f"{stem}.scale", self._scale(tensor)),
        ]
        return build.op("DequantizeLinear", operands, {"axis": 1}, like=value)

    def _codes(self, tensor: ir.TensorProtocol) -> weights.Derived:
        limit, shape = self.limit, list(tensor.shape.numpy())
        return weights.Derived(
            f"int8-codes-{limit}",
            [tensor],
            lambda w: quantize_columns(w, limit).codes,
            ir.DataType.INT8,
            shape,
        )

    def _scale(self, tensor: ir.TensorProtocol) -> weights.Derived:
        limit, columns = self.limit, list(tensor.shape.numpy())[1:]
        return weights.Derived(
            f"int8-scale-{limit}",
            [tensor],
            lambda w: quantize_columns(w, limit).scale,
            ir.DataType.FLOAT,
            columns,
        )


def _activations(build: g.Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return ``x`` rounded, each token divided by its largest magnitude, and that magnitude."""
    sizes = g.shape(x) or []
    size = build.op("Abs", [x])
    axis = build.constant([-1], "int64")
    largest = build.op("ReduceMax", [size, axis], {"keepdims": 1})
    largest = build.op(
        "Max", [largest, build.constant(TINY, "float32")], like=x, shape=[*sizes[:-1], 1]
    )
    unit = build.op("Div", [x, largest])
    scale = build.constant(1.0 / ACTIVATION_LIMIT, "float32")
    zero = build.constant(ACTIVATION_ZERO, "uint8")
    codes = build.op("QuantizeLinear", [unit, scale, zero], like=x, dtype=ir.DataType.UINT8)
    back = build.op("DequantizeLinear", [codes, scale, zero], like=x)
    return back, largest
