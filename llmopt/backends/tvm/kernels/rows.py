"""Rows of a table that is stored as the weight of a product: an embedding tied to the head.

The layout is that of `linear_storage`, so that the table is stored once. Some rows lie side by
side, and a row is read with a stride of 128 bytes: K cache lines a token in float32, K/8 in 4 bits,
from memory some microseconds; the head reads all of the table for each token.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.kernels.kernel import Kernel
from llmopt.backends.tvm.kernels.linear import Packing
from llmopt.backends.tvm.kernels.linear_storage import TILE, Storage


def gather_packed(packing: Packing) -> Kernel:
    """Return a lookup of rows: the arrays of ``packing``, ``ids [M] int64`` to ``y [M, K]``.

    An id below 0 counts from the end; any other outside 0 … N - 1 is an error of the call.
    """
    storage = packing.storage
    if storage is None:
        function, kind = _floats(packing), "f32"
    else:
        make = _with_points if storage.zero_points else _codes
        function, kind = make(packing, storage), f"w{storage.bits}_b{storage.block}_{storage.scale}"
        kind += f"_z{storage.middle}" + "_signed" * storage.signed
    name = f"gather_packed_{kind}_n{packing.n}_k{packing.k}"
    return Kernel(name, function, (*packing.arrays, "ids"), ("y",))


def _floats(packing: Packing) -> Any:
    shape, _ = packing.arrays["weights"]
    size, width = packing.n, packing.k

    @T.prim_func(s_tir=True)
    def gather(weights_: T.handle, ids_: T.handle, y_: T.handle) -> None:
        count = T.int64()
        weights = T.match_buffer(weights_, shape, "float32")
        ids = T.match_buffer(ids_, (count,), "int64")
        y = T.match_buffer(y_, (count, width), "float32")
        for m in T.serial(count):
            assert -size <= ids[m] and ids[m] < size, "an id is outside the table"
            row: T.let = T.if_then_else(ids[m] < 0, ids[m] + size, ids[m])
            for k in T.serial(width):
                y[m, k] = weights[row // TILE, k, row % TILE]

    return gather


def code(codes: Any, row: Any, k: Any, storage: Storage) -> Any:
    """Return the stored code k of a row, int32."""
    if storage.bits == 4:
        word = codes[row // TILE, k // 8, row % TILE]
        place = k % 4 * 8 + k % 8 // 4 * 4
        return T.bitwise_and(T.shift_right(word, T.cast(place, "int32")), T.int32(15))
    word = codes[row // TILE, k // 4, row % TILE]
    up = T.shift_left(word, T.cast(24 - k % 4 * 8, "int32"))
    if storage.signed:
        return T.shift_right(up, T.int32(24))
    return T.bitwise_and(T.shift_right(up, T.int32(24)), T.int32(255))


def _codes(packing: Packing, storage: Storage) -> Any:
    shapes = packing.arrays
    size, width = packing.n, packing.k

    @T.prim_func(s_tir=True)
    def gather(codes_: T.handle, scale_: T.handle, ids_: T.handle, y_: T.handle) -> None:
        count = T.int64()
        codes = T.match_buffer(codes_, shapes["codes"][0], "int32")
        scale = T.match_buffer(scale_, shapes["scale"][0], shapes["scale"][1])
        ids = T.match_buffer(ids_, (count,), "int64")
        y = T.match_buffer(y_, (count, width), "float32")
        for m in T.serial(count):
            assert -size <= ids[m] and ids[m] < size, "an id is outside the table"
            row: T.let = T.if_then_else(ids[m] < 0, ids[m] + size, ids[m])
            for k in T.serial(width):
                step: T.let = T.cast(scale[row // TILE, k // storage.block, row % TILE], "float32")
                y[m, k] = T.cast(code(codes, row, k, storage) - storage.middle, "float32") * step

    return gather


def _with_points(packing: Packing, storage: Storage) -> Any:
    shapes = packing.arrays
    size, width = packing.n, packing.k

    @T.prim_func(s_tir=True)
    def gather(
        codes_: T.handle, scale_: T.handle, zero_: T.handle, ids_: T.handle, y_: T.handle
    ) -> None:
        count = T.int64()
        codes = T.match_buffer(codes_, shapes["codes"][0], "int32")
        scale = T.match_buffer(scale_, shapes["scale"][0], shapes["scale"][1])
        zero = T.match_buffer(zero_, shapes["zero_point"][0], shapes["zero_point"][1])
        ids = T.match_buffer(ids_, (count,), "int64")
        y = T.match_buffer(y_, (count, width), "float32")
        for m in T.serial(count):
            assert -size <= ids[m] and ids[m] < size, "an id is outside the table"
            row: T.let = T.if_then_else(ids[m] < 0, ids[m] + size, ids[m])
            for k in T.serial(width):
                block: T.let = k // storage.block
                step: T.let = T.cast(scale[row // TILE, block, row % TILE], "float32")
                middle: T.let = T.cast(zero[row // TILE, block, row % TILE], "int32")
                y[m, k] = T.cast(code(codes, row, k, storage) - middle, "float32") * step

    return gather
