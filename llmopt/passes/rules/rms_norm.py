"""Fuse root-mean-square normalization of the last axis into the operator for it.

Rewrites::

    x / sqrt(mean(x ** 2) + epsilon) * scale    into    RMSNormalization(x, scale)

A scale that is missing, or that is not one number per channel, is left outside of an operator
with a scale of ones.

Needs: a floating-point ``x`` [..., d]; the mean over the last axis; ``scale`` [d].
Numerics: the same formula; within 1e-6 relative in float32.
Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.ir.match import Bound, const, either, op
from llmopt.passes.rules import Rule
from llmopt.passes.rules.axes import known_width, last_axis, ones, per_channel

_SQUARE: Final = either(op("Pow", "x", const(2.0)), op("Mul", "x", "x"))
_DEVIATION: Final = op(
    "Sqrt", op("Add", op("ReduceMean", _SQUARE, "axes", keepdims=1), const("epsilon"))
)
_NORMAL: Final = either(
    op("Div", "x", _DEVIATION),
    op("Mul", "x", op("Reciprocal", _DEVIATION)),
    op("Mul", "x", op("Div", const(1.0), _DEVIATION)),
    op(
        "Mul",
        "x",
        op(
            "Pow",
            op("Add", op("ReduceMean", _SQUARE, "axes", keepdims=1), const("epsilon")),
            const(-0.5),
        ),
    ),
)


def check(bound: Bound) -> str | None:
    """Refuse what the operator would compute differently."""
    x = bound["x"]
    if x.dtype is None or not x.dtype.is_floating_point():
        return f"x is {x.dtype}, not floating point"
    if not last_axis(bound["axes"], x):
        return "the mean is not over the last axis"
    return per_channel(bound["scale"], x, "scale") if "scale" in bound else known_width(x)


def rewrite(build: g.Builder, bound: Bound) -> ir.Value:
    """Build the operator."""
    attributes = {"axis": -1, "epsilon": bound["epsilon"]}
    scale = bound.get("scale") or ones(build, bound["x"])
    return build.op("RMSNormalization", [bound["x"], scale], attributes)


RULE: Final = Rule((op("Mul", _NORMAL, "scale"),), check, rewrite)
PLAIN: Final = Rule(_NORMAL.options, check, rewrite)
