"""Dynamic int8: weights scaled per output channel, activations per row, at run time.

``w8a8-dynamic`` computes ``y = x @ w`` for x [M, K] and w [K, N] as::

    largest[m] = max over k of |x[m, k]|                         a scale per token, from it alone
    xq[m, k]   = round(x[m, k] / largest[m] * 127) + 128         uint8, 1 … 255, zero is 128
    wq[k, n]   = round(w[k, n] / scale[n])                       int8, -127 … 127
    y[m, n]    = sum over k of (xq - 128) * wq  *  scale[n] * largest[m] / 127

A row's result depends on that row alone, so a sentence's embedding is the same alone and in a
batch. In ONNX it is Abs, ReduceMax, Max with a tiny number, Div, QuantizeLinear with scale 1/127
and zero point 128, ``com.microsoft.MatMulIntegerToFloat`` with that scale and zero point, and Mul
by the maximum. In onnxruntime 1.32 on a Zen 4 core that is 2.0 to 2.9 times as fast as a float32
MatMul (M 128 and 1024, K and N 384 and 1536); int8 x int8 is 8 to 9 times slower than uint8 x
int8, uint8 x uint8 twice.

The integer sum is exact on CPUs with VNNI (or Arm's dot products). AVX2 without VNNI adds pairs of
products in 16 bits and saturates: there 255 * 127 * 2 > 32767, so weights for such CPUs are limited
to -64 … 64, `quantize_columns` with ``limit=64``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmopt.errors import UnsupportedModelError
from llmopt.quantization.numerics import Floats, row_chunks

ACTIVATION_LIMIT: Final = 127
ACTIVATION_ZERO: Final = 128


@dataclass(frozen=True, eq=False)
class Columns:
    """A weight in int8, one scale per output channel.

    Args:
        codes: [K, N] int8, -limit … limit.
        scale: [N] float32, > 0.
    """

    codes: NDArray[np.int8]
    scale: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Rows:
    """Activations in uint8, one scale per row.

    Args:
        codes: [M, K] uint8, 1 … 255; 128 is zero.
        scale: [M, 1] float32, > 0.
    """

    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]


def quantize_columns(weight: Floats, limit: int = 127) -> Columns:
    """Return a weight [K, N] in int8, to the nearest, half to even; zero is exact.

    >>> one = quantize_columns(np.array([[1.0, 0.0], [-0.4, 0.0]]))
    >>> one.codes.tolist(), (one.scale * 127).tolist()
    ([[127, 0], [-51, 0]], [1.0, 127.0])

    Args:
        weight: [K, N], any float type.
        limit: Largest code: 127, or 64 for CPUs that sum in 16 bits.

    Raises:
        UnsupportedModelError: A value is NaN or infinite.
    """
    largest = np.zeros(weight.shape[1], np.float32)
    for part in row_chunks(*weight.shape):
        np.maximum(largest, np.abs(_float32(weight[part])).max(axis=0), out=largest)
    if not np.isfinite(largest).all():
        column = int(np.argmin(np.isfinite(largest)))
        problem = f"column {column} holds NaN or infinity"
        raise UnsupportedModelError("weight", [problem], "keep it in float, or repair the source")
    scale = _scale(largest, limit)
    codes = np.empty(weight.shape, np.int8)
    for part in row_chunks(*weight.shape):
        codes[part] = np.clip(np.rint(_float32(weight[part]) / scale), -limit, limit)
    return Columns(codes, scale)


def quantize_rows(activations: Floats) -> Rows:
    """Return activations [M, K] in uint8, as the artifact quantizes them at run time.

    >>> one = quantize_rows(np.array([[2.0, -1.0, 0.0], [0.0, 0.0, 0.0]], np.float32))
    >>> one.codes.tolist(), (one.scale * 127).tolist()
    ([[255, 64, 128], [128, 128, 128]], [[2.0], [127.0]])
    """
    values = _float32(activations)
    scale = _scale(np.abs(values).max(axis=1, keepdims=True), ACTIVATION_LIMIT)
    steps = np.clip(np.rint(values / scale), -ACTIVATION_LIMIT, ACTIVATION_LIMIT)
    return Rows((steps + ACTIVATION_ZERO).astype(np.uint8), scale)


def dequantize_columns(columns: Columns) -> NDArray[np.float32]:
    """Return [K, N] float32."""
    return columns.codes * columns.scale


def dequantize_rows(rows: Rows) -> NDArray[np.float32]:
    """Return [M, K] float32."""
    return (rows.codes.astype(np.float32) - ACTIVATION_ZERO) * rows.scale


def matmul(activations: Floats, columns: Columns) -> NDArray[np.float32]:
    """Return ``activations @ weight`` as the artifact computes it: the reference for kernels.

    The sums are exact: at most 127 * 127 * K, in int32 for K < 133144.

    >>> x, w = np.array([[1.0, -2.0]], np.float32), np.array([[0.5], [0.25]], np.float32)
    >>> matmul(x, quantize_columns(w)).round(2).tolist()
    [[0.0]]
    >>> (2**31 - 1) // (127 * 127)
    133144
    """
    rows = quantize_rows(activations)
    sums = (rows.codes.astype(np.int32) - ACTIVATION_ZERO) @ columns.codes.astype(np.int32)
    return sums.astype(np.float32) * columns.scale * rows.scale


def _scale(largest: NDArray[np.float32], limit: int) -> NDArray[np.float32]:
    """Return scales; 1 for all zeros, so that nothing divides by zero."""
    return np.where(largest / limit > 0, largest / limit, 1).astype(np.float32)


def _float32(values: Floats) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # values that overflow become infinite, and are refused
        return values.astype(np.float32)
