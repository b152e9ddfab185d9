"""Quantize the weights of experts to blocks of few bits, as standard DequantizeLinear.

Rewrites::

    Gather(W, e)    into    Gather(Reshape(DequantizeLinear(codes, scale, zero_point)), e)

``codes`` [E * N, K] hold one row for each output of each expert, blocks along K.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from llmopt.interface.arrays import Array
from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome
from llmopt.passes.experts import find_experts
from llmopt.passes.quantize_weights import SHORTEST, dequantized, sources
from llmopt.passes.rounding import Rounding, RoundingPass
from llmopt.quantization.lazy import QuantizedWeight
from llmopt.quantization.numerics import fake_quantize
from llmopt.quantization.schemes import BlockCodes, Blockwise


@dataclass(frozen=True)
class QuantizeExperts(BlockCodes, RoundingPass):
    """Round the weights of experts to the nearest code, as ``quantize-weights`` does others.

    Numerics: those of ``quantize-weights``.
    Scope: both weights of each mixture of gated experts, where a backend multiplies by their codes.
    Leaves: experts of other forms, by name; weights that were not stored row by row; rows of
    fewer than 16 inputs.
    Source: the layout of ONNX DequantizeLinear with ``block_size``, opset 21.

    Args:
        bits: Width of a code: 4 or 8.
    """

    name: ClassVar[str] = "quantize-experts"

    @classmethod
    def of(cls, scheme: Blockwise) -> Self:
        """Return the pass that rounds to ``scheme``."""
        return cls(**scheme.codes)

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for gather, value, base, reason in list(_candidates(program)):
            if base is None:
                outcome.miss(gather, reason)
                continue
            sizes = [g.static(value, axis) or 0 for axis in range(3)]
            rows = dequantized(program.graph, value, QuantizedWeight(base, self._scheme))
            build = g.Builder(gather)
            whole = build.op("Reshape", [rows, build.constant(sizes, "int64")], like=value)
            gather.replace_input_with(0, whole)
            outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome

    @override
    def rounding(self, program: Program, after: Rounding) -> Rounding:
        bases = [base for _, _, base, _ in _candidates(program) if base is not None]
        names = {name for base in bases for name in sources(base)}

        def rounded(name: str, array: Array) -> Array:
            if name not in names:
                return after(name, array)
            rows = np.ascontiguousarray(array).reshape(-1, array.shape[-1])
            return fake_quantize(rows, self._scheme, None).reshape(array.shape)

        return rounded

    @property
    def _scheme(self) -> Blockwise:
        return Blockwise(**self.codes)


def _candidates(
    program: Program,
) -> Iterator[tuple[ir.Node, ir.Value, ir.TensorProtocol | None, str]]:
    """Yield (gather, weight value, weight as [E * N, K] or None, why there is none)."""
    for topk, found in find_experts(program):
        if isinstance(found, str):
            yield topk, topk.outputs[0], None, found
            continue
        for gather in found.gathers:
            value = g.operand(gather, 0)
            tensor = g.weight(value)
            if tensor is None:
                continue  # read from codes already
            if not _by_rows(tensor):
                yield gather, value, None, f"its weight {value.name!r} is not stored row by row"
            elif tensor.shape.numpy()[2] < SHORTEST:
                inputs = tensor.shape.numpy()[2]
                reason = f"its weight has {inputs} inputs, fewer than {SHORTEST}"
                yield gather, value, None, reason
            else:
                yield gather, value, weights.flattened(tensor), ""


def _by_rows(tensor: ir.TensorProtocol) -> bool:
    """Whether every row of ``tensor`` is a row of a tensor of the source."""
    if isinstance(tensor, weights.Leaf):
        return tensor.dtype.is_floating_point()
    if not isinstance(tensor, weights.Derived) or tensor.op not in ("cast", "concat"):
        return False
    same = all(part.shape.numpy()[-1:] == tensor.shape.numpy()[-1:] for part in tensor.parts)
    return same and all(map(_by_rows, tensor.parts))
