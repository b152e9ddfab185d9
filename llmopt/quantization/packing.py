"""Blockwise quantized weights in the layout of MatMulNBits and GatherBlockQuantized.

One row of a weight [N, K] in 4 bits, blocks of 16, K = 40, so 3 blocks, the last one padded::

    codes       c0 c1 c2 … c15 | c16 … c31 | c32 … c39 z z … z      z: the zero point
    data        block 0                  block 1      block 2
                [c1c0] [c3c2] … [c15c14] [c17c16] …   [c33c32] … [zz]     one byte each: the
                                                                         low nibble comes first
    scale       s0                       s1           s2
    zero point  [z1z0] [0 z2]                                            same order, per row

In 8 bits a byte is a code, in 2 bits it holds four, lowest bits first. In 6 bits three bytes hold
four, lowest bits first: onnxruntime has no kernel for those. As arrays:

========== ============================== ==========================
data       [N, K/block, block*bits/8]     uint8, ``B`` of MatMulNBits
scale      [N, K/block]                   float32 or float16
zero_point [N, ceil(K/block * bits / 8)]  uint8, or absent: the middle
========== ============================== ==========================

The same bytes serve a gather of rows, so that an embedding and a tied head are stored once. Stored
is `Packed.table`, data as [N, K'*bits/8], which GatherBlockQuantized takes directly
(uint8, ``gather_axis=0``, ``quantize_axis=1``, the same ``bits`` and ``block_size``, the same
scale and zero point); MatMulNBits takes a Reshape of it. With the Reshape before
the gather instead, onnxruntime 1.32 keeps a second copy of the bytes. The gather returns rows of K'
values, K' = K padded; a Slice removes the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmopt.quantization.numerics import (
    Codes,
    Floats,
    Importance,
    Quantized,
    each_chunk,
    quantize_blockwise,
    row_chunks,
)
from llmopt.quantization.schemes import Blockwise


@dataclass(frozen=True, eq=False)
class Packed:
    """A blockwise quantized weight, codes packed into bytes.

    Args:
        data: [N, K'/block, block*bits/8] uint8, K' = K rounded up to full blocks.
        scale: [N, K'/block] float32 or float16.
        zero_point: [N, ceil(K'/block * bits / 8)] uint8, or None where it is the middle code.
        scheme: Quantization scheme.
        columns: K.
    """

    data: Codes
    scale: Floats
    zero_point: Codes | None
    scheme: Blockwise
    columns: int

    @property
    def table(self) -> Codes:
        """Codes as [N, K'*bits/8], for a gather of rows."""
        return self.data.reshape(len(self.data), -1)

    def rows(self, part: slice) -> Packed:
        """Return a view of some rows."""
        points = None if self.zero_point is None else self.zero_point[part]
        return Packed(self.data[part], self.scale[part], points, self.scheme, self.columns)


def empty(rows: int, columns: int, scheme: Blockwise, scale_dtype: type = np.float32) -> Packed:
    """Return arrays for `quantize_packed` to fill.

    >>> like = empty(3, 40, Blockwise(bits=4, block=16, symmetric=False))
    >>> like.data.shape, like.table.shape, like.scale.shape, like.zero_point.shape
    ((3, 3, 8), (3, 24), (3, 3), (3, 2))
    """
    blocks, bits = scheme.blocks(columns), scheme.bits
    points = None if scheme.symmetric else np.empty((rows, -(-blocks * bits // 8)), np.uint8)
    data = np.empty((rows, blocks, scheme.block * bits // 8), np.uint8)
    return Packed(data, np.empty((rows, blocks), scale_dtype), points, scheme, columns)


def quantize_packed(
    weight: Floats,
    scheme: Blockwise,
    importance: Importance | None = None,
    *,
    scale_dtype: type = np.float32,
    out: Packed | None = None,
) -> Packed:
    """Return ``pack(quantize_blockwise(weight))`` without a full copy of the codes.

    Args:
        weight: [N, K] of any float type; a memory map is read chunk by chunk.
        scheme: Bits, block, symmetry.
        importance: [K] float32, > 0: weight of each column's error; None for equal weights.
        scale_dtype: ``np.float32`` or ``np.float16``; ignored if ``out`` is passed.
        out: Arrays from `empty` to write into.

    Raises:
        UnsupportedModelError: A value is NaN or infinite, or too large for a float16 scale.
        ValueError: The weight is not a matrix, or ``out`` has another shape or scheme.
    """
    if weight.ndim != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight {weight.shape}: expected a matrix [N, K], K > 0")
    rows, columns = weight.shape
    like = empty(rows, columns, scheme, scale_dtype) if out is None else out
    if like.scheme != scheme or (len(like.data), like.columns) != weight.shape:
        raise ValueError(f"out is for {like.scheme}, not {scheme} of {weight.shape}")
    stored = like.scale.dtype.type

    def work(part: slice) -> None:
        codes = quantize_blockwise(
            weight[part], scheme, importance, scale_dtype=stored, first_row=part.start
        )
        _pack_into(codes, like.rows(part))

    each_chunk(work, rows, columns)
    return like


def pack(quantized: Quantized) -> Packed:
    """Return a weight with its codes packed.

    >>> codes = np.array([[1, 2, 3, 4] + [8] * 12], np.uint8)
    >>> one = np.ones((1, 1), np.float32)
    >>> pack(Quantized(codes, one, None, Blockwise(4, 16), 16)).data[0, 0].tolist()
    [33, 67, 136, 136, 136, 136, 136, 136]
    """
    rows, scheme = len(quantized.codes), quantized.scheme
    packed = empty(rows, quantized.columns, scheme, quantized.scale.dtype.type)
    for part in row_chunks(rows, quantized.codes.shape[1]):
        _pack_into(quantized.rows(part), packed.rows(part))
    return packed


def unpack(packed: Packed) -> Quantized:
    """Return a weight with one byte per code: the inverse of `pack`.

    Scales are shared with ``packed``, and so are codes of 8 bits.
    """
    bits, blocks = packed.scheme.bits, packed.scale.shape[1]
    codes = _spread(packed.table, bits, packed.scheme.padded(packed.columns))
    points = None if packed.zero_point is None else _spread(packed.zero_point, bits, blocks)
    return Quantized(codes, packed.scale, points, packed.scheme, packed.columns)


def _pack_into(quantized: Quantized, out: Packed) -> None:
    bits = quantized.scheme.bits
    out.scale[:] = quantized.scale
    out.table[:] = _squeeze(quantized.codes, bits)
    if out.zero_point is not None and quantized.zero_point is not None:
        out.zero_point[:] = _squeeze(quantized.zero_point, bits)


def _squeeze(codes: Codes, bits: int) -> Codes:
    """Return codes [N, W] as bytes [N, ceil(W * bits / 8)], lowest bits first, zero bits last."""
    if bits == 6:
        return _squeeze_six(codes)
    while bits < 8:
        if codes.shape[1] % 2:
            codes = np.pad(codes, ((0, 0), (0, 1)))
        pairs = np.ascontiguousarray(codes).view("<u2")  # a pair read at once: 5 times faster
        codes, bits = ((pairs >> (8 - bits)) | pairs).astype(np.uint8), bits * 2
    return codes


def _spread(data: Codes, bits: int, width: int) -> Codes:
    """Return bytes [N, W] as codes [N, width], one byte each."""
    if bits == 8:
        return data[:, :width]
    if bits == 6:
        return _spread_six(data, width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (data[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(len(data), -1)[:, :width]


def _squeeze_six(codes: Codes) -> Codes:
    """Return codes [N, W] of 6 bits as bytes [N, ceil(W * 6 / 8)]: four codes in three bytes.

    >>> _squeeze_six(np.array([[1, 2, 3, 63]], np.uint8)).tolist()
    [[129, 48, 252]]
    """
    rows, width = codes.shape
    padded = np.pad(codes, ((0, 0), (0, -width % 4)))
    fours = np.ascontiguousarray(padded).view("<u4")  # four codes at once, 8 bits apart
    close = np.zeros_like(fours)
    for index in range(4):
        close |= (fours >> (2 * index)) & np.uint32(63 << (6 * index))
    threes = close.view(np.uint8).reshape(rows, -1, 4)[..., :3]
    return threes.reshape(rows, -1)[:, : -(-width * 6 // 8)]


def _spread_six(data: Codes, width: int) -> Codes:
    """Return bytes [N, W] as codes [N, width] of 6 bits: the inverse of `_squeeze_six`."""
    rows = len(data)
    fours = np.zeros((rows, -(-data.shape[1] // 3), 4), np.uint8)
    padded = np.pad(data, ((0, 0), (0, -data.shape[1] % 3)))
    fours[..., :3] = padded.reshape(rows, -1, 3)
    close = fours.reshape(rows, -1).view("<u4")
    apart = np.zeros_like(close)
    for index in range(4):
        apart |= (close & np.uint32(63 << (6 * index))) << (2 * index)
    return apart.view(np.uint8)[:, :width]
