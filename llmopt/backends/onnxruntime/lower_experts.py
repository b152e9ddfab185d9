"""Lower mixtures of experts to ONNX Runtime's one operator for them.

Rewrites::

    ReduceSum(p * (Gather(D, e) @ (Swish(g) * u))), g, u = Split(Gather(GU, e) @ x)
        into    MoE<swiglu>(x, logits, GU', D)
        or, where both are read from codes,
        into    QMoE<swiglu>(x, logits, codes of GU', scales, codes of D, scales)

GU' has a row of the gate and a row of what it gates by turns, as the kernels read them. Written
out, the weights of an expert are copied for each token that goes to it; the kernels multiply all
tokens of an expert at once.
"""

from __future__ import annotations

from collections.abc import Callable
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
Order = Callable[[ir.TensorProtocol], ir.TensorProtocol]
"""Puts the rows of a weight [E, N, K] in the order that the kernel reads."""
Codes = tuple[ir.Value, ir.Value, ir.Value | None]
"""Codes [E, N, K * bits / 8], scales [E, N, blocks], and zero points where there are any."""


@dataclass(frozen=True)
class LowerExperts(Pass):
    """Lower mixtures of gated experts to MoE, or QMoE where their weights are quantized.

    Numerics: exact in another order of additions; where two experts are equally likely, another
    one may be chosen. At accuracy level 4, and in 8 bits always, activations are rounded to int8.
    Scope: experts of the form ``D @ (Swish(G @ x) * (U @ x))``, chosen by softmax.
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
        for topk, found in list(find_experts(program)):
            reason = found if isinstance(found, str) else self._lower(found)
            if reason is None:
                outcome.hit()
            else:
                outcome.miss(topk, reason)
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome

    def _lower(self, found: Experts) -> str | None:
        """Replace a mixture; return why not, if not."""
        end = found.result.producer()
        assert end is not None
        values = (found.gate_up, found.down)
        parts = [_quantized(value) for value in values]
        plain = [g.weight(value) for value in values]
        attributes = {**_SWIGLU, "k": found.k, "normalize_routing_weights": int(found.normalized)}
        build, name = g.Builder(end), f"{g.scope_of(found.gathers[0])}/MoE".lstrip("/")
        if any(part is not None and part.columns * part.scheme.bits % 8 for part in parts):
            return "a row of codes does not end with a byte"
        if all(parts):
            out = self._quantized(build, found, [part for part in parts if part], attributes)
        elif all(plain):
            first = weights.interleaved(next(tensor for tensor in plain if tensor is not None))
            turns = build.initializer(f"{found.gate_up.name}.by_turns", first)
            inputs = [found.x, found.logits, turns, None, found.down]
            out = build.op("MoE", inputs, attributes, domain=MICROSOFT, name=name)
        else:
            return "its weights are computed, or only one of them is quantized"
        g.replace(found.result, out)
        return None

    def _quantized(
        self,
        build: g.Builder,
        found: Experts,
        parts: list[QuantizedWeight],
        attributes: dict[str, object],
    ) -> ir.Value:
        scheme = parts[0].scheme
        gate_up = _stored(build, found.gate_up, parts[0], weights.interleaved)
        down = _stored(build, found.down, parts[1], lambda tensor: tensor)
        inputs: list[ir.Value | None] = [
            *(found.x, found.logits),
            *(gate_up[0], gate_up[1], None),
            *(down[0], down[1], None),
        ]
        if gate_up[2] is not None:
            inputs += [None, None, None, gate_up[2], down[2]]
        attributes = {
            **attributes,
            "expert_weight_bits": scheme.bits,
            "block_size": scheme.block,
            "accuracy_level": self.accuracy_level,
        }
        name = f"{g.scope_of(found.gathers[0])}/QMoE".lstrip("/")
        return build.op("QMoE", inputs, attributes, domain=MICROSOFT, name=name)


_SWIGLU: Final[dict[str, object]] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,  # gates and what they gate by turns
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
}


def _quantized(value: ir.Value) -> QuantizedWeight | None:
    """Return the weight whose codes ``value`` [E, N, K] is read from."""
    shaped = g.producer(value, "Reshape")
    rows = shaped.inputs[0] if shaped is not None else None
    cut = g.producer(rows, "Slice")
    node = g.producer(rows if cut is None else cut.inputs[0], "DequantizeLinear")
    codes = g.weight(node.inputs[0]) if node is not None else None
    return codes.of if isinstance(codes, QuantizedPart) else None


def _stored(build: g.Builder, value: ir.Value, weight: QuantizedWeight, order: Order) -> Codes:
    """Store the codes of a weight, its rows in another order."""
    sizes = [g.static(value, axis) or 0 for axis in range(3)]
    source = weights.parts_of(weight.base)[0]
    turned = QuantizedWeight(weights.flattened(order(source)), weight.scheme)
    stem = next(weights.leaves(source)).source
    points = None if weight.scheme.symmetric else turned.zero_bytes()
    width = sizes[2] * weight.scheme.bits // 8
    return (
        build.initializer(f"{stem}.bytes", _matrices(turned.table(), sizes[0], width)),
        build.initializer(f"{stem}.scales", _matrices(turned.scale(), sizes[0])),
        None
        if points is None
        else build.initializer(f"{stem}.zero_points", _matrices(points, sizes[0])),
    )


def _matrices(
    tensor: ir.TensorProtocol, experts: int, width: int | None = None
) -> ir.TensorProtocol:
    """Return a tensor [E * N, M] as [E, N, M], or [E, N, width] without what pads its rows."""
    rows, columns = tensor.shape.numpy()
    width = columns if width is None else width
    shape = (experts, rows // experts, width)
    return weights.Derived(
        "matrices", [tensor], lambda a: a[:, :width].reshape(shape), tensor.dtype, shape
    )
