"""Lower norms and activations to ONNX Runtime's fused operators.

Rewrites::

    s = Add(x, residual); y = RMSNormalization(s, scale)
        into  y, s = SkipSimplifiedLayerNormalization(x, residual, scale)
    s = Add(Add(x, bias), residual); y = LayerNormalization(s, scale, shift)
        into  y, s = SkipLayerNormalization(x, residual, scale, shift, bias)
    Swish(x)                          into  QuickGelu<alpha = 1>(x)
    Gelu(Add(x, bias))                into  BiasGelu(x, bias), or FastGelu by tanh
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass

MICROSOFT: Final = "com.microsoft"


@dataclass(frozen=True)
class FuseSkipNorm(Pass):
    """Fuse the residual sum in front of a norm, and the bias in front of the sum, into it.

    Numerics: exact order of additions may differ; within 1e-6 relative in float32.
    Scope: sums of two values of the norm's own shape. Leaves: broadcast sums.
    """

    name: ClassVar[str] = "fuse-skip-norm"
    lowers: ClassVar[bool] = True

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for norm in g.nodes(program.graph, "RMSNormalization", "LayerNormalization"):
            total = g.producer(norm.inputs[0], "Add")
            if total is None:
                continue
            if (reason := _unfit(norm)) is not None:
                outcome.miss(norm, reason)
                continue
            x, residual = g.operand(total, 0), g.operand(total, 1)
            if not _same_shape(x, residual, norm.outputs[0]):
                outcome.miss(norm, f"it adds {g.shape(x)} and {g.shape(residual)}")
                continue
            if g.rank(x) != 3:
                outcome.miss(norm, f"its input is of rank {g.rank(x)}, not [B, S, E]")
                continue
            _fuse(norm, total, x, residual)
            outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


def _unfit(norm: ir.Node) -> str | None:
    """Return why the fused operator would compute something else, or None."""
    if g.attribute(norm, "axis", -1) not in (-1, (g.rank(norm.inputs[0]) or 0) - 1):
        return "it normalizes more than the last axis"
    if any(value is not None and value.producer() for value in norm.inputs[1:]):
        return "its scale or shift is computed"
    if any(out.uses() or out.is_graph_output() for out in norm.outputs[1:]):
        return "its mean or deviation has a reader"
    return None


def _same_shape(x: ir.Value, residual: ir.Value, out: ir.Value) -> bool:
    shape = g.shape(out)
    return shape is not None and g.shape(x) == shape == g.shape(residual)


def _fuse(norm: ir.Node, total: ir.Node, x: ir.Value, residual: ir.Value) -> None:
    simple = norm.op_type == "RMSNormalization"
    op_type = "SkipSimplifiedLayerNormalization" if simple else "SkipLayerNormalization"
    x, residual, bias = _with_bias(x, residual)
    scales = [v for v in norm.inputs[1:] if v is not None]
    if not simple and len(scales) == 1:
        scales.append(None)  # type: ignore[arg-type]
    inputs = [x, residual, *scales] + ([bias] if bias is not None else [])
    # in front of the sum's first reader: the norm may come after others that read the sum
    build = g.Builder(total)
    outputs = build.ops(
        op_type,
        inputs,
        {"epsilon": g.attribute(norm, "epsilon", 1e-5)},
        outputs=4,
        domain=MICROSOFT,
        name=norm.name,
    )
    outputs[3].shape, outputs[3].type = total.outputs[0].shape, total.outputs[0].type
    g.replace(norm.outputs[0], outputs[0])
    g.replace(total.outputs[0], outputs[3])


def _with_bias(x: ir.Value, residual: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Return x, residual and the bias that one of them had added, if any."""
    for biased, other in ((x, residual), (residual, x)):
        add = g.producer(biased, "Add")
        if add is None or g.sole_user(biased) is None:
            continue
        for index in (0, 1):
            bias = g.operand(add, index)
            if bias.is_initializer() and g.rank(bias) == 1:
                return g.operand(add, 1 - index), other, bias
    return x, residual, None


@dataclass(frozen=True)
class LowerActivations(Pass):
    """Lower Swish and biased Gelu to the operators that have CPU kernels.

    Numerics: within 1e-6 relative in float32. Scope: the graph. Leaves: Gelu without a bias,
    which ONNX Runtime runs as it is.
    """

    name: ClassVar[str] = "lower-activations"
    lowers: ClassVar[bool] = True

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in g.nodes(program.graph, "Swish"):
            alpha = g.attribute(node, "alpha", 1.0)
            build = g.Builder(node)
            out = build.op("QuickGelu", [node.inputs[0]], {"alpha": alpha}, domain=MICROSOFT)
            g.replace(node.outputs[0], out)
            outcome.hit()
        for node in g.nodes(program.graph, "Gelu"):
            if _bias_gelu(node):
                outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


def _bias_gelu(node: ir.Node) -> bool:
    add = g.producer(node.inputs[0], "Add")
    if add is None or g.sole_user(add.outputs[0]) is None:
        return False
    for index in (0, 1):
        bias = g.operand(add, index)
        if bias.is_initializer() and g.rank(bias) == 1:
            by_tanh = g.attribute(node, "approximate", "none") == "tanh"
            op_type = "FastGelu" if by_tanh else "BiasGelu"
            x = g.operand(add, 1 - index)
            out = g.Builder(node).op(op_type, [x, bias], domain=MICROSOFT)
            g.replace(node.outputs[0], out)
            return True
    return False
