"""AMX's tiles in plain loops: any machine runs the kernels that are written for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmopt.backends.tvm.kernels.script import T, load, serial


class EmulatedTiles:
    """Eight tiles of 16 x 16 words of 32 bits, whatever they hold."""

    def __init__(self) -> None:
        self.tiles: list[Any] = []
        self.depth = 0

    def configure(self, depth: int = 64) -> None:
        """Make the tiles; operands are ``depth`` bytes deep."""
        self.depth = depth
        self.tiles = [T.alloc_buffer((16, 16), "int32") for _ in range(8)]

    def zero(self, tile: int) -> None:
        """Set sums to zero."""
        with serial(16) as i, serial(16) as j:
            T.buffer_store(self.tiles[tile], T.int32(0), [i, j])

    def load(self, tile: int, buffer: Any, index: tuple[Any, ...], stride: int) -> None:
        """Read a tile a word at a time."""
        words = self.depth // 4 if tile in {4, 5} else 16
        rows = self.depth // 4 if tile > 5 else 16
        place = places(buffer, index, stride)
        with serial(rows) as i, serial(words) as j:
            word = load(buffer, place(i, j), 1)
            T.buffer_store(self.tiles[tile], T.reinterpret("int32", word), [i, j])

    def multiply(self, sums: int, left: int, right: int) -> None:
        """Add the products of signed bytes to sums of int32."""
        c, a, b = (self.tiles[tile] for tile in (sums, left, right))
        with serial(16) as i, serial(16) as j, serial(self.depth // 4) as k, serial(4) as byte:
            up = T.int32(24) - 8 * byte
            first, second = ((word << up) >> T.int32(24) for word in (a[i, k], b[k, j]))
            T.buffer_store(c, c[i, j] + first * second, [i, j])

    def multiply_halves(self, sums: int, left: int, right: int) -> None:
        """Add the products of bfloat16 to sums of float32."""
        c, a, b = (self.tiles[tile] for tile in (sums, left, right))
        with serial(16) as i, serial(16) as j, serial(self.depth // 4) as k, serial(2) as half:
            up = T.int32(16) - 16 * half
            first, second = (
                T.reinterpret("float32", (word << up) & T.int32(-65536))
                for word in (a[i, k], b[k, j])
            )
            total = T.reinterpret("float32", c[i, j]) + first * second
            T.buffer_store(c, T.reinterpret("int32", total), [i, j])

    def store(self, tile: int, buffer: Any, index: tuple[Any, ...], stride: int) -> None:
        """Write sums."""
        place = places(buffer, index, stride)
        dtype = str(buffer.ty.dtype)
        with serial(16) as i, serial(16) as j:
            word = self.tiles[tile][i, j]
            value = word if dtype == "int32" else T.reinterpret(dtype, word)
            T.buffer_store(buffer, value, place(i, j))

    def release(self) -> None:
        """Forget the tiles: what follows must configure them."""
        self.tiles = []


def places(buffer: Any, index: tuple[Any, ...], stride: int) -> Callable[[Any, Any], list[Any]]:
    """Return where a tile's words are in a buffer whose elements have 4 bytes."""
    if len(index) == 1:
        return lambda i, j: [index[0] + i * (stride // 4) + j]
    assert stride == 4 * int(buffer.shape[-1])
    *before, row, column = index
    return lambda i, j: [*before, row + i, column + j]
