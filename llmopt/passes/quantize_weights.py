"""Quantize weights to blocks of few bits, as standard DequantizeLinear.

Rewrites::

    MatMul(x, W)         into    MatMul(x, Transpose(DequantizeLinear(codes, scale, zero_point)))
    Gather(E, ids)       into    Gather(DequantizeLinear(codes, scale, zero_point), ids)

``codes`` [N, K] hold W transposed, one row per output, blocks along K; an embedding and the head
tied to it share one DequantizeLinear. Backends lower the pattern to their own kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from llmopt.interface.arrays import Array
from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome
from llmopt.passes.experts import routers
from llmopt.passes.rounding import Rounding, RoundingPass
from llmopt.quantization.lazy import QuantizedWeight
from llmopt.quantization.numerics import Importance, fake_quantize
from llmopt.quantization.schemes import BlockCodes, Blockwise

SHORTEST: Final = 16  # a row with fewer inputs is shorter than the smallest block


@dataclass(frozen=True)
class QuantizeWeights(BlockCodes, RoundingPass):
    """Round the weights of projections and of the token embedding to the nearest code.

    Numerics: each weight in the range of its block's codes moves by at most half a scale, one
    beyond takes the code at the end; in 4 and 6 bits scales are those with the least error,
    weighted by the activations that were measured. What that does to the outputs is measured, not
    bounded.
    Scope: MatMul with a matrix of weights; Gather of the token embedding.
    Leaves: other tables, vectors, matrices with fewer than 16 inputs, and what chooses experts.
    Source: the layout of ONNX DequantizeLinear with ``block_size``, opset 21.

    Args:
        head: Bits of the head and of the embedding tied to it; 0 for as many as the others.
    """

    name: ClassVar[str] = "quantize-weights"
    head: int = 0

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        heads = _heads(program)
        made: dict[object, ir.Value] = {}
        for node, value, base in list(candidates(program)):
            if base.shape.numpy()[1] < SHORTEST:
                outcome.miss(node, f"its weight has {base.shape[1]} inputs, fewer than {SHORTEST}")
                continue
            key = weights.identity(base)
            if key not in made:
                scheme = self._scheme.of(head=key in heads)
                weight = QuantizedWeight(base, scheme, importance(program, base))
                made[key] = dequantized(program.graph, value, weight)
            rows = made[key]
            if g.is_op(node, "Gather"):
                node.replace_input_with(0, rows)
            else:
                turned = g.Builder(node).op("Transpose", [rows], {"perm": [1, 0]}, like=value)
                node.replace_input_with(1, turned)
            outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome

    @override
    def rounding(self, program: Program, after: Rounding) -> Rounding:
        turned: dict[str, bool] = {}
        how: dict[str, tuple[Blockwise, Importance | None]] = {}
        heads = _heads(program)
        for _, _, base in candidates(program):
            if base.shape.numpy()[1] >= SHORTEST:
                turned |= dict(leaf_turns(base, transposed=False))
                scheme = self._scheme.of(head=weights.identity(base) in heads)
                how |= dict.fromkeys(sources(base), (scheme, importance(program, base)))

        def rounded(name: str, array: Array) -> Array:
            if name not in turned:
                return after(name, array)
            # blocks lie along one row, so rounding a merged matrix is rounding its parts
            rows = np.ascontiguousarray(array.T if turned[name] else array)
            values = fake_quantize(rows, *how[name])
            return values.T if turned[name] else values

        return rounded

    @property
    def _scheme(self) -> Blockwise:
        return Blockwise(**self.codes, head=self.head)


def leaf_turns(tensor: ir.TensorProtocol, *, transposed: bool) -> Iterator[tuple[str, bool]]:
    """Yield each source tensor and whether its rows are inputs, not outputs."""
    if isinstance(tensor, weights.Leaf):
        yield tensor.source, transposed
    for part in weights.parts_of(tensor):
        yield from leaf_turns(part, transposed=transposed ^ weights.is_transpose(tensor))


def sources(tensor: ir.TensorProtocol) -> Iterator[str]:
    """Yield the name of each source tensor."""
    return (leaf.source for leaf in weights.leaves(tensor))


def importance(program: Program, base: ir.TensorProtocol) -> Importance | None:
    """Return how much each column of a weight [N, K] matters, None if nobody measured.

    What was merged is met by the same activations: the first part speaks for all.
    """
    known = program.facts.activations
    found = next((known[name] for name in sources(base) if name in known), None)
    return found if found is not None and found.shape == (base.shape.numpy()[1],) else None


def _heads(program: Program) -> set[object]:
    """Return the identity of every weight that has a row for each token of the vocabulary."""
    vocabulary = program.facts.model.vocabulary
    return {
        weights.identity(base)
        for part in program.whole.parts()  # an embedding that is a head elsewhere is one here
        for node, _, base in candidates(part)
        if g.is_op(node, "MatMul") and base.shape.numpy()[0] == vocabulary
    }


def candidates(program: Program) -> Iterator[tuple[ir.Node, ir.Value, ir.TensorProtocol]]:
    """Yield (node, weight value, weight as [N, K]) of all that can be quantized."""
    tokens, choosing = program.input(Role.TOKENS), routers(program)
    for node in g.nodes(program.graph, "MatMul", "Gather"):
        if node in choosing:
            continue  # rounded, it would choose others
        index = 1 if node.op_type == "MatMul" else 0
        tensor = g.weight(node.inputs[index])
        if tensor is None or len(tensor.shape) != 2 or not tensor.dtype.is_floating_point():
            continue
        if not any(weights.leaves(tensor)):
            continue  # computed by the model itself: a table, not a weight
        if node.op_type == "MatMul":
            yield node, g.operand(node, 1), weights.transposed(tensor)
        elif node.inputs[1] is tokens and g.attribute(node, "axis", 0) == 0:
            yield node, g.operand(node, 0), tensor


def dequantized(graph: ir.Graph, value: ir.Value, weight: QuantizedWeight) -> ir.Value:
    """Return the value of ``weight`` [N, K] read from codes."""
    scheme = weight.scheme
    build = g.Builder(graph[0])
    stem = str(value.name).removesuffix(".transpose")
    operands = [
        build.initializer(f"{stem}.codes", weight.codes()),
        build.initializer(f"{stem}.scale", weight.scale()),
        build.initializer(f"{stem}.zero_point", weight.zero_point()),
    ]
    attributes = {"axis": 1, "block_size": scheme.block}
    padded = scheme.padded(weight.columns)
    rows = build.op(
        "DequantizeLinear",
        operands,
        attributes,
        name=f"{stem}/DequantizeLinear",
        shape=[weight.rows, padded],
        dtype=ir.DataType.FLOAT,
    )
    if padded == weight.columns:
        return rows
    bounds = [build.constant([n], "int64") for n in (0, weight.columns, 1)]
    return build.op("Slice", [rows, *bounds], like=rows, shape=[weight.rows, weight.columns])
