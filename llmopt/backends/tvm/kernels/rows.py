"""Rows of a table that is stored as the weight of a product: an embedding tied to the head.

The layout is that of `linear_storage`, so that the table is stored once. Some rows lie side by
side, and a row is read with a stride of 128 bytes: K cache lines a token in float32, K/8 in 4 bits,
from memory some microseconds; the head reads all of the table for each token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.kernels.kernel import Kernel
from llmopt.backends.tvm.kernels.linear.selection import Packing
from llmopt.backends.tvm.kernels.linear.storage import TILE, Halves, Storage
from llmopt.backends.tvm.kernels.signature import Argument, kernel


def gather_packed(packing: Packing) -> Kernel:
    """Return a lookup of rows: the arrays of ``packing``, ``ids [M] int64`` to ``y [M, K]``.

    An id below 0 counts from the end; any other outside 0 … N - 1 is an error of the call.
    """
    size, width, storage = packing.n, packing.k, packing.storage

    def body(buffers: Mapping[str, Any]) -> None:
        ids, y = buffers["ids"], buffers["y"]
        with T.serial(ids.ty.shape[0]) as m:
            inside = T.And(T.int64(-size) <= ids[m], ids[m] < size)
            with T.Assert(inside, "an id is outside the table"):
                row = T.bind(T.if_then_else(ids[m] < 0, ids[m] + size, ids[m]))
                with T.serial(width) as k:
                    T.buffer_store(y, _number(buffers, row, k, storage), [m, k])

    inputs = [Argument(name, *of) for name, of in packing.arrays.items()]
    inputs.append(Argument("ids", ("m",), "int64"))
    name = f"gather_packed_{_label(storage)}_n{size}_k{width}"
    return kernel(name, inputs, [Argument("y", ("m", width))], body)


def _label(storage: Storage | Halves | None) -> str:
    if not isinstance(storage, Storage):
        return "f32" if storage is None else f"bf16_{storage.columns}"
    blocks = f"w{storage.bits}_b{storage.block}_{storage.scale}"
    return f"{blocks}_z{storage.middle}" + "_signed" * storage.signed


def _number(buffers: Mapping[str, Any], row: Any, k: Any, storage: Storage | Halves | None) -> Any:
    """Return number k of a row, float32."""
    tile, lane = row // TILE, row % TILE
    if storage is None:
        return buffers["weights"][tile, k, lane]
    if isinstance(storage, Halves):
        pair = T.shift_right(buffers["weights"][tile, k // 2, lane], T.cast(k % 2 * 16, "int32"))
        return T.reinterpret(T.shift_left(pair, T.int32(16)), dtype="float32")
    block = T.bind(k // storage.block)
    middle: Any = storage.middle
    if storage.zero_points:
        middle = T.cast(buffers["zero_point"][tile, block, lane], "int32")
    step = T.bind(T.cast(buffers["scale"][tile, block, lane], "float32"))
    return T.cast(_code(buffers["codes"], row, k, storage) - middle, "float32") * step


def _code(codes: Any, row: Any, k: Any, storage: Storage) -> Any:
    """Return the stored code k of a row, int32."""
    at = k // storage.unit * storage.words
    if storage.bits < 8:
        low = codes[row // TILE, at + k % storage.unit // 8, row % TILE]
        code = _bits(low, k % 4 * 8 + k % 8 // 4 * 4, 15)
        if storage.bits == 4:
            return code
        high = codes[row // TILE, at + 2, row % TILE]
        return T.bitwise_or(code, T.shift_left(_bits(high, k % 4 * 8 + k % 16 // 4 * 2, 3), 4))
    word = codes[row // TILE, at, row % TILE]
    up = T.shift_left(word, T.cast(24 - k % 4 * 8, "int32"))
    if storage.signed:
        return T.shift_right(up, T.int32(24))
    return T.bitwise_and(T.shift_right(up, T.int32(24)), T.int32(255))


def _bits(word: Any, shift: Any, mask: int) -> Any:
    return T.bitwise_and(T.shift_right(word, T.cast(shift, "int32")), T.int32(mask))
