"""Fuse the sigmoid-weighted linear unit into the operator for it.

Rewrites::

    x * sigmoid(x)    into    Swish(x)

Needs: a floating-point ``x``.
Numerics: the same formula; within 1e-6 relative in float32.
Source: Ramachandran, Zoph and Le 2017, https://arxiv.org/abs/1710.05941.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.ir.match import Bound, op
from llmopt.passes.rules import Rule


def check(bound: Bound) -> str | None:
    """Refuse what the operator would compute differently."""
    dtype = bound["x"].dtype
    return None if dtype and dtype.is_floating_point() else f"x is {dtype}, not floating point"


def rewrite(build: g.Builder, bound: Bound) -> ir.Value:
    """Build the operator."""
    return build.op("Swish", [bound["x"]])


RULE: Final = Rule((op("Mul", "x", op("Sigmoid", "x")),), check, rewrite)
