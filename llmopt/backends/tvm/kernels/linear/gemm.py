"""Many rows times integer weights, for prefill and encoders: ``w4``, ``w8``, ``w8a8-dynamic``.

Rows are rounded to int8 by all threads; then threads share pieces of the result, a piece being a
tile of 32 outputs times some 128 rows::

             32 outputs                A tile's weights, 32 * K / 2 bytes in 4 bits, stay in the
           ┌────────────┐              nearest cache while its rows pass, a few at a time; they
     rows  │ 4 rows     │  AVX-512     are unpacked in registers once for those rows. The next
           │ 4 rows     │              piece of the same thread has the same rows, which stay in
           │ ...        │              the second cache, and the next tile.
           └────────────┘

The last rows are computed together with copies of the last one, which are not stored, so the
code exists once.

Roofline: multipliers. 4 rows and 2 vectors of 512 bits are 64 instructions of 64 products for
every 32 columns, beside 8 multiply-adds for the scales of the weights and 2 for those of the
activations, which are one for 128 columns: 86 % of the slots multiply codes. Converting sums and
unpacking 4 bits use other units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from llmopt.backends.tvm.kernels.linear.epilogue import Epilogue
from llmopt.backends.tvm.kernels.linear.products import DotProducts
from llmopt.backends.tvm.kernels.linear.quantize import allocate, quantize_row
from llmopt.backends.tvm.kernels.linear.storage import HALF, TILE, Storage, tiles
from llmopt.backends.tvm.kernels.linear.tile import Tile
from llmopt.backends.tvm.kernels.script import Expr, T, bind, parallel, serial, when

Step = Callable[[Expr], None]
ROWS: Final = 128
"""Rows of a piece, about: their codes, 128 * K bytes, fit the second cache for K up to some
thousands."""
_SHAPES: Final = {
    (16, 32): (4, TILE),
    (8, 16): (3, HALF),
    (4, 32): (3, HALF),
    (4, 16): (2, HALF),
}
"""Lanes and registers of a processor: rows and outputs at once."""
_PAIRS: Final = (6, 8)
"""Rows and outputs where two are multiplied with two: 12 sums and 12 parts, of 32 registers."""


def emit(
    buffers: Mapping[str, Any], epilogue: Epilogue, k: int, storage: Storage, products: DotProducts
) -> None:
    """Emit the kernel of many rows.

    Args:
        buffers: ``x`` [M, K], the weight's arrays, what the epilogue reads, ``y`` [M, N].
        epilogue: Epilogue of the product.
        k: Columns of the weight.
        storage: Layout of the weight.
        products: Integer products of this processor.
    """
    m = buffers["x"].shape[0]
    activations = allocate(m, storage)
    with parallel(m) as row:
        quantize_row(buffers["x"], row, k, storage, activations)
    at_once, width = _shape(storage, products)
    tile_of = Tile(storage, products, activations, buffers)

    def begin(tile: Expr) -> Step:
        def step(first: Expr) -> None:
            rows = [bind(T.min(first + i, m - 1)) for i in range(at_once)]
            for i, vectors in enumerate(tile_of.emit(rows, tile, width)):
                with when(first + i < m):
                    epilogue.write(first + i, tile, vectors)

        return step

    each_piece(m, tiles(epilogue.n, paired=epilogue.paired), at_once, begin)


def _shape(storage: Storage, products: DotProducts) -> tuple[int, int]:
    """Return how many rows and outputs are computed at once."""
    if products.pair is not None:
        return _PAIRS
    rows, width = _SHAPES[products.lanes, products.registers]
    if products.registers == 16 and storage.block * storage.bits <= 128:
        width = products.lanes  # sums and scales of short blocks leave fewer registers
    return rows, width


def each_piece(m: Expr, count: int, at_once: int, begin: Callable[[Expr], Step]) -> None:
    """Emit the loops over pieces of the result, and over the rows of each.

    Args:
        m: Number of rows.
        count: Number of tiles.
        at_once: Number of rows in a step.
        begin: Emits what a piece of a tile begins with; what it returns emits the rows from a
            first one on.
    """

    def piece(tile: Expr, first: Expr, steps: Expr) -> None:
        step = begin(tile)
        with serial(steps) as i:
            step(bind(first + i * at_once))

    pieces(m, count, (at_once, ROWS), piece)


def pieces(
    m: Expr, count: int, sizes: tuple[int, int], emit_piece: Callable[[Expr, Expr, Expr], None]
) -> None:
    """Emit the loop over pieces of the result, which threads share.

    Args:
        m: Number of rows.
        count: Number of tiles.
        sizes: Number of rows in a step, and about how many a piece has.
        emit_piece: Emitter of a tile's rows, from a first row on, for a number of steps.
    """
    at_once, rows = sizes
    chunks = bind(T.floordiv(m + rows - 1, T.int64(rows)))
    steps = T.floordiv(T.floordiv(m + chunks - 1, chunks) + at_once - 1, at_once)
    size = bind(steps * at_once)  # as even as can be: threads get the same number of pieces
    with parallel(chunks * count) as index:
        tile, chunk = bind(T.floormod(index, count)), bind(T.floordiv(index, count))
        there = bind(T.min(m - chunk * size, size))
        emit_piece(tile, bind(chunk * size), bind(T.floordiv(there + at_once - 1, at_once)))
