"""Side conditions that several rules share."""

from __future__ import annotations

import numpy as np
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


def known_width(x: ir.Value) -> str | None:
    """Return why the channels of ``x`` cannot be counted, or None."""
    width = g.static(x, -1)
    return None if width is not None else f"the width of {g.shape(x)} is not known"


def ones(build: g.Builder, x: ir.Value) -> ir.Value:
    """Return a scale that changes nothing, in the type of ``x``."""
    width, dtype = g.static(x, -1), x.dtype
    assert width is not None
    assert dtype is not None
    return build.constant(np.ones(width, dtype.numpy()))
