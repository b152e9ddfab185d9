"""Attention as products and a softmax, where no fused operator computes the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llmopt.ir import graph as g


def written_out(
    build: g.Builder,
    operands: tuple[ir.Value, ir.Value, ir.Value],
    mask: ir.Value | None,
    scale: float,
    softcap: float,
) -> ir.Value:
    """Return softmax(softcap * tanh(q k^T * scale / softcap) + mask) v, [B, H, S, D].

    Args:
        build: Where the nodes go.
        operands: q [B, H, S, D], k and v [B, G, T, D], G a divisor of H.
        mask: [B or 1, 1, S, T] boolean or added; None where all is seen.
        scale: What scores are multiplied by.
        softcap: What they are bounded by.
    """
    q, k, v = operands
    heads, groups = g.static(q, 1), g.static(k, 1)
    assert heads is not None
    assert groups is not None
    # queries of one group together: [B, G, H/G, S, D] against [B, G, 1, D, T]
    width = g.static(q, 3) or -1
    grouped = build.constant([0, groups, heads // groups, -1, width], "int64")
    q = build.op("Reshape", [q, grouped])
    axis = build.constant([2], "int64")
    k, v = (build.op("Unsqueeze", [x, axis]) for x in (k, v))
    turned = build.op("Transpose", [k], {"perm": [0, 1, 2, 4, 3]})
    q = build.op("Mul", [q, build.constant(scale, "float32")])
    scores = build.op("MatMul", [q, turned])
    cap = build.constant(softcap, "float32")
    scores = build.op("Mul", [build.op("Tanh", [build.op("Div", [scores, cap])]), cap])
    scores = _masked(build, scores, mask)
    weights = build.op("Softmax", [scores], {"axis": -1})
    mixed = build.op("MatMul", [weights, v])
    joined = build.constant([0, heads, -1, width], "int64")
    return build.op("Reshape", [mixed, joined])


def _masked(build: g.Builder, scores: ir.Value, mask: ir.Value | None) -> ir.Value:
    if mask is None:
        return scores
    for_groups = build.op("Unsqueeze", [mask, build.constant([1], "int64")])
    if mask.dtype is not None and mask.dtype.is_floating_point():
        return build.op("Add", [scores, for_groups])
    # the lowest finite number: a row that sees nothing must not become NaN
    low = build.constant(np.finfo(np.float32).min, "float32")
    return build.op("Where", [for_groups, scores, low])
