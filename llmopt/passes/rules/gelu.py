"""Fuse the Gaussian error linear unit, exact or by tanh, into the operator for it.

Rewrites::

    0.5 * x * (1 + erf(x / sqrt(2)))                               into    Gelu(x)
    0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x ** 3)))     into    Gelu(x), by tanh

Needs: a floating-point ``x``.
Numerics: the same formula; within 1e-6 relative in float32.
Source: Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415.
"""

from __future__ import annotations

import math
from typing import Final

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.ir.match import Bound, Pattern, const, either, op
from llmopt.passes.rules import Rule

_ERF: Final = op(
    "Erf",
    either(
        op("Div", "x", const(math.sqrt(2.0))),
        op("Mul", "x", const(1 / math.sqrt(2.0))),
    ),
)
_CUBE: Final = either(
    op("Pow", "x", const(3.0)),
    op("Mul", "x", op("Mul", "x", "x")),
    op("Mul", op("Mul", "x", "x"), "x"),
)
_INNER: Final = op("Add", "x", op("Mul", _CUBE, const(0.044715)))
_TANH: Final = op("Tanh", op("Mul", _INNER, const(math.sqrt(2.0 / math.pi))))


def _halves(inner: Pattern) -> tuple[Pattern, ...]:
    """Return the places where the factor 0.5 of ``0.5 * x * (1 + inner)`` may stand."""
    one = op("Add", inner, const(1.0))
    return (
        op("Mul", op("Mul", "x", const(0.5)), one),
        op("Mul", op("Mul", "x", one), const(0.5)),
        op("Mul", "x", op("Mul", one, const(0.5))),
        op("Mul", op("Div", "x", const(2.0)), one),
    )


def check(bound: Bound) -> str | None:
    """Refuse what the operator would compute differently."""
    dtype = bound["x"].dtype
    return None if dtype and dtype.is_floating_point() else f"x is {dtype}, not floating point"


def _exact(build: g.Builder, bound: Bound) -> ir.Value:
    return build.op("Gelu", [bound["x"]])


def _by_tanh(build: g.Builder, bound: Bound) -> ir.Value:
    return build.op("Gelu", [bound["x"]], {"approximate": "tanh"})


EXACT: Final = Rule(_halves(_ERF), check, _exact)
BY_TANH: Final = Rule(_halves(_TANH), check, _by_tanh)
