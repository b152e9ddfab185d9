"""Fuse layer normalization of the last axis into the operator for it.

Rewrites::

    (x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + epsilon) * scale + bias
    into    LayerNormalization(x, scale, bias)

The bias may be missing; a scale that is missing, or that is not one number per channel, as where
each head has its own, is left outside of an operator with a scale of ones.

Needs: a floating-point ``x`` [..., d]; both means over the last axis; ``scale`` and ``bias`` [d].
Numerics: the same formula; within 1e-6 relative in float32.
Source: Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.ir.match import Bound, const, either, op
from llmopt.passes.rules import Rule
from llmopt.passes.rules.axes import known_width, last_axis, ones, per_channel

_CENTERED: Final = op("Sub", "x", op("ReduceMean", "x", "axes", keepdims=1))
_SQUARE: Final = either(op("Pow", _CENTERED, const(2.0)), op("Mul", _CENTERED, _CENTERED))
_VARIANCE: Final = either(
    op("ReduceMean", _SQUARE, "axes2", keepdims=1),
    op("Div", op("ReduceSum", _SQUARE, "axes2", keepdims=1), const("count")),
)
_DEVIATION: Final = op("Sqrt", op("Add", _VARIANCE, const("epsilon")))
_NORMAL: Final = either(
    op("Div", _CENTERED, _DEVIATION),
    op("Mul", _CENTERED, op("Reciprocal", _DEVIATION)),
    op("Mul", _CENTERED, op("Div", const(1.0), _DEVIATION)),
)


def check(bound: Bound) -> str | None:
    """Refuse what the operator would compute differently."""
    x = bound["x"]
    if x.dtype is None or not x.dtype.is_floating_point():
        return f"x is {x.dtype}, not floating point"
    if not (last_axis(bound["axes"], x) and last_axis(bound["axes2"], x)):
        return "a mean is not over the last axis"
    if "count" in bound and bound["count"] != g.static(x, -1):
        return f"the variance divides by {bound['count']:g}, not by the width {g.static(x, -1)}"
    vectors = [name for name in ("scale", "bias") if name in bound]
    reasons = (per_channel(bound[name], x, name) for name in vectors)
    return next(filter(None, reasons), None) or known_width(x)


def rewrite(build: g.Builder, bound: Bound) -> ir.Value:
    """Build the operator."""
    scale = bound.get("scale") or ones(build, bound["x"])
    inputs = [bound["x"], scale, *([bound["bias"]] if "bias" in bound else [])]
    return build.op("LayerNormalization", inputs, {"axis": -1, "epsilon": bound["epsilon"]})


RULE: Final = Rule((op("Add", op("Mul", _NORMAL, "scale"), "bias"),), check, rewrite)
UNBIASED: Final = Rule((op("Mul", _NORMAL, "scale"),), check, rewrite)
PLAIN: Final = Rule(_NORMAL.options, check, rewrite)
