"""Attention as products and a softmax, where no fused operator computes the same."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

from llmopt.ir import graph as g

LOW: Final = -3e4
"""Where a score is masked: within float16, and to a softmax the same as minus infinity."""


def written_out(
    build: g.Builder,
    operands: tuple[ir.Value, ir.Value, ir.Value],
    mask: ir.Value | None,
    scale: float,
    softcap: float,
) -> ir.Value:
    """Return softmax(softcap * tanh(q k^T * scale / softcap) + mask) v, [B, H, S, D].

    Args:
        build: Builder that inserts the nodes.
        operands: Tensors q [B, H, S, D], k and v [B, G, T, D], G a divisor of H.
        mask: Mask [B or 1, 1, S, T], boolean or additive; None for full attention.
        scale: Factor of the scores.
        softcap: Bound of the scores.
    """
    q, k, v = operands
    heads, groups = g.static(q, 1), g.static(k, 1)
    assert heads is not None
    assert groups is not None
    k, v = (_repeated(build, x, heads, groups) for x in (k, v))
    q = build.op("Mul", [q, _number(build, scale, q)])
    scores = build.op("MatMul", [q, build.op("Transpose", [k], {"perm": [0, 1, 3, 2]})])
    cap = _number(build, softcap, q)
    scores = build.op("Mul", [build.op("Tanh", [build.op("Div", [scores, cap])]), cap])
    weights = build.op("Softmax", [_masked(build, scores, mask, q)], {"axis": -1})
    return build.op("MatMul", [weights, v])


def _repeated(build: g.Builder, x: ir.Value, heads: int, groups: int) -> ir.Value:
    """Return [B, G, T, D] with each of its heads repeated for its group: [B, H, T, D]."""
    if heads == groups:
        return x
    apart = build.op("Unsqueeze", [x, build.constant([2], "int64")])
    times = build.constant([1, 1, heads // groups, 1, 1], "int64")
    target = build.constant([0, heads, -1, g.static(x, 3) or -1], "int64")
    return build.op("Reshape", [build.op("Expand", [apart, times]), target])


def _number(build: g.Builder, number: float, like: ir.Value) -> ir.Value:
    return build.constant(number, np.float32 if like.dtype is None else like.dtype.numpy())


def _masked(
    build: g.Builder, scores: ir.Value, mask: ir.Value | None, operand: ir.Value
) -> ir.Value:
    if mask is None:
        return scores
    if mask.dtype is not None and mask.dtype.is_floating_point():
        return build.op("Add", [scores, mask])
    # a finite number: a fully masked row must not become NaN; every type can represent it
    return build.op("Where", [mask, scores, _number(build, LOW, operand)])
