"""Weights from rows into the layout of the kernels, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from llmopt.backends.tvm.kernels.linear.storage import HALF, TILE, Storage, tiles
from llmopt.errors import UnsupportedModelError
from llmopt.interface.arrays import Array
from llmopt.quantization.dynamic import Columns
from llmopt.quantization.numerics import Quantized, quantize_blockwise
from llmopt.quantization.packing import Packed, unpack
from llmopt.quantization.schemes import Blockwise

_CHUNK: Final = 1 << 19  # codes at a time


def pack_floats(weight: Array, n: int, *, paired: bool) -> dict[str, Array]:
    """Return ``weights`` [T, K, 32] float32 of a weight [N, K]."""
    k = weight.shape[1]
    packed = np.empty((tiles(n, paired=paired), k, TILE), np.float32)
    for part, rows in _parts(n, k, paired=paired):
        packed[part] = _by_lane(_take(weight, rows).astype(np.float32))
    return {"weights": packed}


def pack_halves(weight: Array, n: int, columns: int, *, paired: bool) -> dict[str, Array]:
    """Return ``weights`` [T, K'/2, 32], pairs of bfloat16, of a weight [N, K] rounded to it."""
    k = weight.shape[1]
    packed = np.empty((tiles(n, paired=paired), columns // 2, TILE), np.int32)
    for part, rows in _parts(n, columns, paired=paired):
        halves = np.zeros((len(rows), columns), ml_dtypes.bfloat16)
        halves[:, :k] = _take(weight, rows)
        packed[part] = _by_lane(halves.view(np.int32))
    return {"weights": packed}


def pack_blocks(
    weight: Array | Quantized | Packed, n: int, storage: Storage, *, paired: bool
) -> dict[str, Array]:
    """Return ``codes``, ``scale`` and ``zero_point`` of a weight [N, K] in blocks.

    A weight in floats is rounded to the nearest code on the way.
    """
    scheme = storage.scheme
    assert scheme is not None
    arrays = _empty(n, storage, paired=paired)
    for part, rows in _parts(n, storage.columns, paired=paired):
        some = _codes(weight, rows, scheme)
        _fill(arrays, part, storage, (some.codes, some.scale, some.zero_point, rows))
    return arrays


def pack_channels(weight: Columns, n: int, storage: Storage, *, paired: bool) -> dict[str, Array]:
    """Return ``codes`` and ``scale`` of int8 codes [K, N] with one scale a column.

    Raises:
        UnsupportedModelError: a code is beyond what the kernel multiplies exactly.
    """
    arrays = _empty(n, storage, paired=paired)
    k = weight.codes.shape[0]
    for part, rows in _parts(n, storage.columns, paired=paired):
        codes = np.zeros((len(rows), storage.columns), np.int16)
        codes[:, :k] = _take(weight.codes.T, rows)
        if storage.middle == 64 and np.abs(codes).max() > 64:
            problem = "int8 codes beyond -64 ... 64 saturate on AVX2"
            raise UnsupportedModelError("weight", [problem], "quantize-dynamic{limit=64}")
        scale = _take(weight.scale[:, None], rows)
        stored = (codes + storage.middle).astype(np.int8 if storage.signed else np.uint8)
        _write(arrays, part, stored.view(np.uint8), scale)
    return arrays


def _empty(n: int, storage: Storage, *, paired: bool) -> dict[str, Array]:
    count, width = tiles(n, paired=paired), storage.columns * storage.bits // 32
    arrays = {
        "codes": np.empty((count, width, TILE), np.int32),
        "scale": np.empty((count, storage.blocks, TILE), storage.scale),
    }
    if storage.zero_points:
        dtype = np.int8 if storage.signed else np.uint8
        arrays["zero_point"] = np.empty((count, storage.blocks, TILE), dtype)
    return arrays


def _parts(n: int, columns: int, *, paired: bool) -> Iterator[tuple[slice, npt.NDArray[np.intp]]]:
    """Yield runs of tiles and the row of each of their lanes, -1 where there is none."""
    count = tiles(n, paired=paired)
    step = max(1, _CHUNK // (columns * TILE))
    for start in range(0, count, step):
        part = slice(start, min(count, start + step))
        yield part, _rows(np.arange(part.start, part.stop), n, paired=paired)


def _rows(tile: npt.NDArray[np.intp], n: int, *, paired: bool) -> npt.NDArray[np.intp]:
    if not paired:
        rows = tile[:, None] * TILE + np.arange(TILE)
        return np.where(rows < n, rows, -1).ravel()
    gates = tile[:, None] * HALF + np.arange(HALF)
    gates = np.where(gates < n // 2, gates, -1)
    return np.concatenate([gates, np.where(gates < 0, -1, gates + n // 2)], axis=1).ravel()


def _take(values: Array, rows: npt.NDArray[np.intp]) -> Array:
    """Return some rows, zeros where there is none."""
    taken = values[np.maximum(rows, 0)]
    if (rows < 0).any():
        taken[rows < 0] = 0
    return taken


def _codes(
    weight: Array | Quantized | Packed, rows: npt.NDArray[np.intp], scheme: Blockwise
) -> Quantized:
    there = np.maximum(rows, 0)
    if isinstance(weight, Packed):
        points = None if weight.zero_point is None else weight.zero_point[there]
        some = Packed(weight.data[there], weight.scale[there], points, scheme, weight.columns)
        return unpack(some)
    if isinstance(weight, Quantized):
        points = None if weight.zero_point is None else weight.zero_point[there]
        return Quantized(weight.codes[there], weight.scale[there], points, scheme, weight.columns)
    return quantize_blockwise(_take(weight, rows), scheme)


def _fill(
    arrays: dict[str, Array],
    part: slice,
    storage: Storage,
    some: tuple[Array, Array, Array | None, npt.NDArray[np.intp]],
) -> None:
    codes, scale, points, rows = some
    scale = np.where(rows[:, None] < 0, 0, scale)
    if storage.signed:
        codes = codes ^ np.uint8(128)
    if points is not None:
        stored = points ^ np.uint8(128) if storage.signed else points
        arrays["zero_point"][part] = _by_lane(stored).view(arrays["zero_point"].dtype)
    _write(arrays, part, _words(codes, storage.bits), scale)


def _words(codes: Array, bits: int) -> Array:
    """Return codes [N, K'] as bytes [N, K' * bits / 8], in the order of `linear_storage`."""
    if bits == 8:
        return codes
    quads = np.ascontiguousarray(codes).view(np.uint32)
    low = quads & np.uint32(0x0F0F0F0F)
    words = low[:, ::2] | low[:, 1::2] << 4
    if bits == 6:
        high = quads >> 4 & np.uint32(0x03030303)
        top = high[:, ::4] | high[:, 1::4] << 2 | high[:, 2::4] << 4 | high[:, 3::4] << 6
        words = np.stack([words[:, ::2], words[:, 1::2], top], axis=2).reshape(len(codes), -1)
    return np.ascontiguousarray(words).view(np.uint8)


def _write(arrays: dict[str, Array], part: slice, codes: Array, scale: Array) -> None:
    arrays["codes"][part] = _by_lane(np.ascontiguousarray(codes).view(np.int32))
    with np.errstate(over="ignore"):
        arrays["scale"][part] = _by_lane(scale)
    if not np.isfinite(arrays["scale"][part]).all():
        raise UnsupportedModelError("weight", ["a scale does not fit float16"], "leave it in float")


def _by_lane(values: Array) -> Array:
    """Return rows [T * 32, X] as [T, X, 32]."""
    return values.reshape(-1, TILE, values.shape[1]).transpose(0, 2, 1)
