"""Lower mixtures of experts to ONNX Runtime's fused operators.

Rewrites::

    ReduceSum(p * (Gather(D, e) @ (Swish(g) * u))), g, u = Split(Gather(GU, e) @ x)
    share_0 * (D_0 @ (Swish(g_0) * u_0)) + share_1 * …, g_i, u_i = Split(x @ GU_i)
        into    MoE<swiglu>(x, logits, GU', D)
        or, where all are read from codes,
        into    QMoE<swiglu>(x, logits, codes of GU', scales, codes of D, scales)

GU' interleaves the rows of gate and up projection, as the kernels read them. Without the fused
operator, an expert's weights are copied for each token routed to it, or every expert is computed
for every token; the kernels compute the chosen experts alone, each for all its tokens at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.experts import Experts, find_experts
from llmopt.quantization.lazy import QuantizedPart, QuantizedWeight

MICROSOFT: Final = "com.microsoft"
Codes = tuple[ir.Value, ir.Value, ir.Value | None]
"""Codes [E, N, K * bits / 8], scales [E, N, blocks], and zero points where there are any."""


@dataclass(frozen=True)
class LowerExperts(Pass):
    """Lower mixtures of gated experts to MoE, or QMoE where their weights are quantized.

    Numerics: exact in another order of additions; where two experts are equally likely, another
    one may be chosen. At accuracy level 4, and in 8 bits always, activations are rounded to int8.
    Scope: experts of the form ``D @ (Swish(G @ x) * (U @ x))``, chosen by softmax; those that
    were chosen are gathered, or all are computed and weighed.
    Leaves: experts of other forms, by name; they are computed as written.
    Source: com.microsoft.MoE and QMoE, ``swiglu_fusion=1`` with alpha 1 and beta 0.

    Args:
        accuracy_level: 0 multiplies by codes of 4 bits in float32, 4 in int8.
    """

    name: ClassVar[str] = "lower-experts"
    lowers: ClassVar[bool] = True
    accuracy_level: int = 4

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for topk, moe in list(find_experts(program)):
            reason = moe if isinstance(moe, str) else self._lower(moe)
            if reason is None:
                outcome.hit()
            else:
                outcome.miss(topk, reason)
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome

    def _lower(self, moe: Experts) -> str | None:
        """Replace a mixture; return the reason if it cannot be lowered."""
        end = moe.result.producer()
        assert end is not None
        build, values = g.Builder(end), (*moe.gate_up, *moe.down)
        coded = [part for value in values if (part := _quantized(value)) is not None]
        plain = [g.weight(value) for value in values]
        schemes = {part.scheme for part in coded}
        if any(part.columns * part.scheme.bits % 8 for part in coded):
            return "a row of codes does not end at a byte boundary"
        if len(coded) == len(values) and len(schemes) == 1:
            out = self._by_codes(build, moe, coded)
        elif all(plain):
            rows = _stacked(moe.gate_up, moe.count, interleave=True)
            inputs = [
                *(moe.x, _rows(build, moe)),
                *(build.initializer(f"{_stem(moe.gate_up)}.by_turns", rows), None),
                build.initializer(f"{_stem(moe.down)}.rows", _stacked(moe.down, moe.count)),
            ]
            out = build.op("MoE", inputs, _attributes(moe), domain=MICROSOFT, name=_name(moe))
        else:
            return "its weights are computed, or not all quantized by one scheme"
        out.shape, out.type = moe.result.shape, moe.result.type
        g.replace(moe.result, out)
        return None

    def _by_codes(
        self, build: g.Builder, moe: Experts, parts: Sequence[QuantizedWeight]
    ) -> ir.Value:
        scheme, half = parts[0].scheme, len(moe.gate_up)
        first = _codes(build, parts[:half], moe.count, interleave=True)
        second = _codes(build, parts[half:], moe.count)
        inputs: list[ir.Value | None] = [
            *(moe.x, _rows(build, moe)),
            *(first[0], first[1], None),
            *(second[0], second[1], None),
        ]
        if first[2] is not None:
            inputs += [None, None, None, first[2], second[2]]
        attributes = {
            **_attributes(moe),
            "expert_weight_bits": scheme.bits,
            "block_size": scheme.block,
            "accuracy_level": self.accuracy_level,
        }
        return build.op("QMoE", inputs, attributes, domain=MICROSOFT, name=_name(moe))


def _attributes(moe: Experts) -> dict[str, object]:
    return {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,  # rows of gate and up are interleaved
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "k": moe.k,
        "normalize_routing_weights": int(moe.normalized),
    }


def _name(moe: Experts) -> str:
    reader = g.users(moe.gate_up[0])[0]
    return f"{g.scope_of(reader)}/Experts".lstrip("/")


def _rows(build: g.Builder, moe: Experts) -> ir.Value:
    """Return logits as [N, E], the one shape that the kernels take."""
    if g.rank(moe.logits) == 2:
        return moe.logits
    return build.op("Reshape", [moe.logits, build.constant([-1, moe.count], "int64")])


def _stem(values: Sequence[ir.Value]) -> str:
    return str(values[0].name).removesuffix(".transpose")


def _stacked(
    values: Sequence[ir.Value], count: int, *, interleave: bool = False
) -> ir.TensorProtocol:
    """Return weights as [E, N, K]: one that is, or [K, N] of each expert."""
    parts = []
    for value in values:
        tensor = g.weight(value)
        assert tensor is not None
        stacked = g.rank(value) == 3
        rows = weights.flattened(tensor) if stacked else weights.transposed(tensor)
        parts.append(weights.interleaved(rows, count if stacked else 1) if interleave else rows)
    return weights.stacked(parts, count, parts[0].shape.numpy()[1])


def _quantized(value: ir.Value) -> QuantizedWeight | None:
    """Return the weight whose codes are read as [E, N, K], or as [K, N] of one expert."""
    view = g.producer(value, "Reshape", "Transpose")
    rows = view.inputs[0] if view is not None else None
    cut = g.producer(rows, "Slice")
    node = g.producer(rows if cut is None else cut.inputs[0], "DequantizeLinear")
    codes = g.weight(node.inputs[0]) if node is not None else None
    return codes.of if isinstance(codes, QuantizedPart) else None


def _codes(
    build: g.Builder, parts: Sequence[QuantizedWeight], count: int, *, interleave: bool = False
) -> Codes:
    """Store the codes of weights of all experts, or of each, without what pads their rows."""
    if interleave:
        each = count // len(parts)
        parts = [
            QuantizedWeight(weights.interleaved(p.base, each), p.scheme, p.importance)
            for p in parts
        ]
    scheme, columns = parts[0].scheme, parts[0].columns
    stem = next(weights.leaves(parts[0].base)).source
    blocks = scheme.blocks(columns)
    stored = {
        "bytes": ([part.table() for part in parts], columns * scheme.bits // 8),
        "scales": ([part.scale() for part in parts], blocks),
    }
    if not scheme.symmetric:
        stored["zero_points"] = ([p.zero_bytes() for p in parts], -(-blocks * scheme.bits // 8))
    operands = [
        build.initializer(f"{stem}.experts.{name}", weights.stacked(tensors, count, width))
        for name, (tensors, width) in stored.items()
    ]
    return operands[0], operands[1], operands[2] if len(operands) == 3 else None
