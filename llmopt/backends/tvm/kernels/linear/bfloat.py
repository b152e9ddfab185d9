"""Many rows times bfloat16 weights on AMX's tiles of 16 x 32 numbers.

Rows are rounded to bfloat16 by all threads, into tiles that lie one after the other. Then a thread
takes a tile of 32 weights' rows, which lie as the processor wants them, and up to 512 rows of
activations, 32 at a time: four sums of 16 x 16, two tiles of activations, two of weights::

                      weights  [16 pairs of columns, 32]
                      ┌──────┬──────┐
                      │ 6    │ 7    │  a tile's row: 16 outputs, two columns each
          activations ├──────┼──────┤
           ┌──────┐   │ 0    │ 1    │  float32 [32, 32]
           │ 4    │   ├──────┼──────┤
           │ 5    │   │ 2    │ 3    │
           └──────┘   └──────┴──────┘

Sums stay in their tiles for all columns; nothing is scaled, so they are stored once.

Roofline: tiles multiply 32 columns of 32 x 32 results in 64 cycles and load four tiles for it, half
of them from the first cache and half from the second, which gives a tile in 16 to 20. Few rows are
bound by memory, 2 bytes for each weight: the next tile is asked for while this one's rows pass, and
results before they are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from llmopt.backends.tvm.kernels.amx import HIGH, Tiles, four_products
from llmopt.backends.tvm.kernels.attention.element_types import BfloatPairs
from llmopt.backends.tvm.kernels.linear.epilogue import Epilogue
from llmopt.backends.tvm.kernels.linear.gemm import pieces
from llmopt.backends.tvm.kernels.linear.storage import DEPTH, HALF, TILE, tiles
from llmopt.backends.tvm.kernels.script import (
    Expr,
    T,
    bind,
    load,
    number,
    parallel,
    prefetch,
    serial,
    store,
)

_LANES: Final = 16
_PAIRS: Final = DEPTH // 2
_STRIDE: Final = 64  # bytes of a tile's row
_AT_ONCE: Final = 32
_FEW, _MANY = 128, 512
_NEAR: Final = 1 << 20
"""Bytes of rows that every tile of weights reads again: half of the second cache."""
_FETCHING: Final = 4
"""Times 32 rows while which the next tile of weights is asked for."""


@dataclass(frozen=True)
class _BfloatTile:
    """A tile of weights times some rows.

    Args:
        unit: The processor's tiles.
        epilogue: Epilogue of the product; it has the weights among its buffers.
        activations: The rounded rows, tiles one below the other: [.., 16 pairs].
        depth: Number of tiles in a row of the weight.
        tile: Index of the tile of outputs.
        sums: [32, 32] float32.
    """

    unit: Tiles
    epilogue: Epilogue
    activations: Any
    depth: int
    tile: Expr
    sums: Any

    def emit(self, first: Expr, steps: Expr) -> None:
        """Emit ``steps`` times 32 rows; while the first pass, the next tile is asked for."""
        self.unit.configure()
        ahead = bind(T.min(steps, T.int64(_FETCHING)))
        with serial(ahead) as step:
            self._rows(first, step, fetch=True)
        with serial(steps - ahead) as step:
            self._rows(first, ahead + step, fetch=False)
        self.unit.release()

    def _rows(self, first: Expr, step: Expr, *, fetch: bool) -> None:
        """Emit 32 rows of the result, or what there is of them."""
        unit, weights = self.unit, self.epilogue.buffers["weights"]
        row = bind(first + step * _AT_ONCE)
        there = bind(T.min(self.epilogue.buffers["x"].shape[0] - row, T.int64(_AT_ONCE)))
        for tile in range(4):
            unit.zero(tile)
        upper = bind(T.floordiv(row, HIGH) * (self.depth * HIGH))
        with serial(self.depth) as part:
            for at in (0, 1):
                line = upper + (at * self.depth + part) * HIGH
                unit.load(4 + at, self.activations, (line, 0), _STRIDE)
                unit.load(6 + at, weights, (self.tile, part * _PAIRS, at * HALF), 4 * TILE)
            four_products(unit, halves=True)
            if fetch:
                self._fetch(step * self.depth + part)
            self._ask(row, there, part)
        for tile in range(4):
            unit.store(tile, self.sums, (HIGH * (tile // 2), HALF * (tile % 2)), 4 * TILE)
        with serial(there) as at:
            vectors = [load(self.sums, [at, place], _LANES) for place in (0, HALF)]
            self.epilogue.write(row + at, self.tile, vectors)

    def _fetch(self, part: Expr) -> None:
        """Ask for a part of the next tile of weights, of `_FETCHING` times as many as it has."""
        lines = _PAIRS // _FETCHING
        for i in range(lines):
            for place in (0, HALF):
                line = (self.tile + 1, part * lines + i, place)
                prefetch(self.epilogue.buffers["weights"], line, near=2)

    def _ask(self, row: Expr, there: Expr, part: Expr) -> None:
        """Ask for a part of the lines that will be written."""
        each = -(-_AT_ONCE // self.depth)
        for i in range(each):
            self.epilogue.fetch(T.min(row + part * each + i, row + there - 1), self.tile)


def emit(buffers: Mapping[str, Any], epilogue: Epilogue, k: int, unit: Tiles) -> None:
    """Emit the kernel of many rows.

    Args:
        buffers: ``x`` [M, K], ``weights``, what the epilogue reads, ``y`` [M, N].
        epilogue: Epilogue of the product.
        k: Columns of the weight.
        unit: The processor's tiles.
    """
    m, depth = buffers["x"].shape[0], -(-k // DEPTH)
    padded = T.floordiv(m + _AT_ONCE - 1, _AT_ONCE) * _AT_ONCE
    activations = T.alloc_buffer((padded * depth, _PAIRS), "int32")
    with parallel(m) as row:
        _round(buffers["x"], row, k, activations)
    rows = max(_FEW, min(_MANY, _NEAR // (2 * DEPTH * depth) // _AT_ONCE * _AT_ONCE))

    def piece(tile: Expr, first: Expr, steps: Expr) -> None:
        sums = T.alloc_buffer((_AT_ONCE, TILE), "float32")
        _BfloatTile(unit, epilogue, activations, depth, tile, sums).emit(first, steps)

    pieces(m, tiles(epilogue.n, paired=epilogue.paired), (_AT_ONCE, rows), piece)


def _round(x: Any, row: Expr, k: int, activations: Any) -> None:
    """Emit the rounding of one row; columns behind its end are zeros."""
    depth, spare = -(-k // DEPTH), k % DEPTH
    line = bind(T.floordiv(row, HIGH) * (depth * HIGH) + T.floormod(row, HIGH))
    if k >= DEPTH:
        with serial(k // DEPTH) as part:
            vectors = [load(x, [row, part * DEPTH + at], _LANES) for at in (0, _LANES)]
            store(activations, [line + part * HIGH, 0], BfloatPairs().joined(vectors), _LANES)
    if spare:
        last = T.alloc_buffer((DEPTH,), "float32")
        for at in (0, _LANES):
            store(last, [at], number(0, _LANES), _LANES)
        with serial(spare) as column:
            store(last, [column], load(x, [row, k - spare + column], 1), 1)
        vectors = [load(last, [at], _LANES) for at in (0, _LANES)]
        store(activations, [line + (depth - 1) * HIGH, 0], BfloatPairs().joined(vectors), _LANES)
