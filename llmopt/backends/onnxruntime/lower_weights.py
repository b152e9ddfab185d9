"""Lower weights to what ONNX Runtime's CPU kernels multiply by.

Rewrites::

    MatMul(x, Transpose(DequantizeLinear(codes)))    into    MatMulNBits(x, codes)
    Gather(DequantizeLinear(codes), ids)             into    GatherBlockQuantized(codes, ids)
    MatMul(DequantizeLinear(x), DequantizeLinear(W)) into    MatMulIntegerToFloat(x, W)
    MatMul(x, E^T) with E gathered from elsewhere    into    FusedMatMul<transB>(x, E)

so that an embedding and the head tied to it are stored once, quantized or not.
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
from llmopt.quantization.lazy import QuantizedPart, QuantizedWeight

MICROSOFT: Final = "com.microsoft"
FLOAT: Final = ir.DataType.FLOAT
Stored = tuple[ir.Value, ir.Value, ir.Value | None]
"""Codes, scales and zero points of a weight."""


@dataclass(frozen=True)
class LowerWeights(Pass):
    """Lower quantized weights to block kernels, and share tied ones.

    Numerics: exact at accuracy level 0; at level 4 activations are rounded to int8 in blocks of
    their own, about 1e-2 relative.
    Scope: the graph. Leaves: DequantizeLinear whose codes were not made by ``quantize-weights``.
    Source: com.microsoft.MatMulNBits, attribute ``accuracy_level``.

    Args:
        accuracy_level: 0 multiplies in float32, 4 in int8.
    """

    name: ClassVar[str] = "lower-weights"
    lowers: ClassVar[bool] = True
    accuracy_level: int = 4

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        stored: dict[QuantizedWeight, Stored] = {}
        for node in g.nodes(program.graph, "Gather"):  # first: tables are stored as they read them
            weight = _quantized(node.inputs[0], transposed=False)
            if isinstance(weight, QuantizedWeight):
                _gather(node, weight, stored)
                outcome.hit()
        for node in g.nodes(program.graph, "MatMul"):
            if _lower_integers(node):
                outcome.hit()
                continue
            weight = _quantized(node.inputs[1], transposed=True)
            if isinstance(weight, str):
                outcome.miss(node, weight)
            elif weight is not None:
                self._product(node, weight, stored)
                outcome.hit()
        outcome.hit(_share_tied(program.graph))
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome

    def _product(
        self, node: ir.Node, weight: QuantizedWeight, stored: dict[QuantizedWeight, Stored]
    ) -> None:
        scheme = weight.scheme
        attributes = {
            "K": weight.columns,
            "N": weight.rows,
            "bits": scheme.bits,
            "block_size": scheme.block,
            "accuracy_level": self.accuracy_level,
        }
        target, bias = _bias(node, weight.rows)
        build = g.Builder(target)
        codes, scale, points = _operands(build, weight, stored, g.operand(node, 0).dtype)
        if codes.const_value is not None and len(codes.const_value.shape) == 2:
            blocks = [weight.rows, scheme.blocks(weight.columns), scheme.block * scheme.bits // 8]
            codes = build.op("Reshape", [codes, build.constant(blocks, "int64")])
        inputs = [node.inputs[0], codes, scale, points, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        out = build.op("MatMulNBits", inputs, attributes, domain=MICROSOFT, name=node.name)
        g.replace(target.outputs[0], out)


def _lower_integers(node: ir.Node) -> bool:
    """Multiply codes as integers where both operands are int8; return whether it did."""
    x, w = (g.producer(node.inputs[i], "DequantizeLinear") for i in (0, 1))
    if x is None or w is None or len(x.inputs) < 3 or g.rank(w.inputs[1]) != 1:
        return False
    if g.attribute(w, "axis", 1) != 1 or g.optional(w, 2) is not None:
        return False
    inputs = [x.inputs[0], w.inputs[0], x.inputs[1], w.inputs[1], x.inputs[2]]
    build = g.Builder(node)
    out = build.op("MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=node.name)
    g.replace(node.outputs[0], out)
    return True


def _quantized(value: ir.Value | None, *, transposed: bool) -> QuantizedWeight | str | None:
    """Return the weight behind ``value``, why it cannot be lowered, or None if it is not one."""
    if transposed:
        transpose = g.producer(value, "Transpose")
        if transpose is None:
            return None
        value = transpose.inputs[0]
    cut = g.producer(value, "Slice")
    node = g.producer(value if cut is None else cut.inputs[0], "DequantizeLinear")
    if node is None:
        return None
    codes = g.weight(node.inputs[0])
    if not isinstance(codes, QuantizedPart):
        return f"the codes of {node.name!r} were not made by quantize-weights"
    return codes.of


def _operands(
    build: g.Builder,
    weight: QuantizedWeight,
    stored: dict[QuantizedWeight, Stored],
    dtype: ir.DataType | None,
    *,
    table: bool = False,
) -> Stored:
    """Return codes, scales (of ``dtype``) and zero points as initializers, each stored once."""
    if weight not in stored:
        leaf = next(weights.leaves(weight.base), None)
        stem = leaf.source if leaf else "weight"
        codes = weight.table() if table else weight.bytes()
        points = None if weight.scheme.symmetric else weight.zero_bytes()
        stored[weight] = (
            build.initializer(f"{stem}.bytes", codes),
            build.initializer(f"{stem}.scales", weights.cast(weight.scale(), dtype or FLOAT)),
            None if points is None else build.initializer(f"{stem}.zero_points", points),
        )
    return stored[weight]


def _bias(node: ir.Node, rows: int) -> tuple[ir.Node, ir.Value | None]:
    """Return the node that ends ``MatMul [+ bias]``, and the bias."""
    add = g.sole_user(node.outputs[0], "Add")
    if add is not None:
        for value in add.inputs:
            if value is not None and value.is_initializer() and g.shape(value) == [rows]:
                return add, value
    return node, None


def _gather(node: ir.Node, weight: QuantizedWeight, stored: dict[QuantizedWeight, Stored]) -> None:
    """Gather rows of the codes, stored flat, so that only the head needs a reshaped view."""
    build = g.Builder(node)
    dtype = node.outputs[0].dtype
    table, scale, points = _operands(build, weight, stored, dtype, table=True)
    scheme = weight.scheme
    attributes = {
        "bits": scheme.bits,
        "block_size": scheme.block,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    inputs = [table, node.inputs[1], scale] + ([points] if points is not None else [])
    out = build.op("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT, name=node.name)
    if scheme.padded(weight.columns) != weight.columns:
        bounds = [build.constant([n], "int64") for n in (0, weight.columns, -1)]
        out = build.op("Slice", [out, *bounds])
    g.replace(node.outputs[0], out)


def _share_tied(graph: ir.Graph) -> int:
    """Let a head read the embedding's own rows instead of a transposed copy."""
    tables = {
        weights.identity(tensor): node.inputs[0]
        for node in g.nodes(graph, "Gather")
        if (tensor := g.weight(node.inputs[0])) is not None and len(tensor.shape) == 2
    }
    shared = 0
    for node in g.nodes(graph, "MatMul"):
        tensor = g.weight(node.inputs[1])
        if tensor is None or not weights.is_transpose(tensor):
            continue
        rows = tables.get(weights.identity(weights.parts_of(tensor)[0]))
        if rows is not None:
            build = g.Builder(node)
            inputs = [node.inputs[0], rows]
            out = build.op("FusedMatMul", inputs, {"transB": 1}, domain=MICROSOFT, name=node.name)
            g.replace(node.outputs[0], out)
            shared += 1
    return shared
