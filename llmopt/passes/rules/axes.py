"""Side conditions that several rules share."""

from __future__ import annotations

import onnx_ir as ir

from llmopt.ir import graph as g


def last_axis(axes: ir.Value, x: ir.Value) -> bool:
    """Whether ``axes`` names just the last axis of ``x``."""
    rank = g.rank(x)
    return g.ints(axes) in ([-1], [None if rank is None else rank - 1])


def per_channel(vector: ir.Value, x: ir.Value, label: str) -> str | None:
    """Return why ``vector`` is not one number for each channel of ``x``, or None."""
    width = g.static(x, -1)
    if g.rank(vector) != 1 or width is None or g.static(vector, 0) != width:
        return f"{label} {g.shape(vector)} is not one number per channel of {g.shape(x)}"
    return None
