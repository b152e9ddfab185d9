"""One row times integer weights, for decoding: ``w4``, ``w8`` and ``w8a8-dynamic``.

The row is rounded once, to int8; then threads share the tiles, each
a run of neighbours::

    thread 0   tile 0 | tile 1 | ... | tile t/2 - 1        a tile: 32 outputs, read
    thread 1   tile t/2 | ...                              once from its first byte to
                                                           its last

Roofline: memory. A weight of 4 bits in blocks of 32 with scales of 16 bits is 4.5 bits, read
once. On a 512-bit processor a vector of 64 bytes (128
codes) takes two products and three operations to unpack: some 30 bytes a cycle, several times
what memory delivers. In 6 bits it is 18 operations for three vectors, some 15 bytes a cycle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmopt.backends.tvm.kernels.linear.epilogue import Epilogue
from llmopt.backends.tvm.kernels.linear.products import DotProducts
from llmopt.backends.tvm.kernels.linear.quantize import allocate, quantize_row
from llmopt.backends.tvm.kernels.linear.storage import TILE, Storage, tiles
from llmopt.backends.tvm.kernels.linear.tile import Tile
from llmopt.backends.tvm.kernels.script import T, parallel


def emit(
    buffers: Mapping[str, Any], epilogue: Epilogue, k: int, storage: Storage, products: DotProducts
) -> None:
    """Emit the kernel of one row.

    Args:
        buffers: ``x`` [1, K], the weight's arrays, what the epilogue reads, ``y`` [1, N].
        epilogue: Epilogue of the product.
        k: Columns of the weight.
        storage: Layout of the weight.
        products: Integer products of this processor.
    """
    row = T.int64(0)
    activations = allocate(T.int64(1), storage)
    quantize_row(buffers["x"], row, k, storage, activations)
    with parallel(T.int64(tiles(epilogue.n, paired=epilogue.paired))) as tile:
        values = Tile(storage, products, activations, buffers).emit([row], tile, TILE)
        epilogue.write(row, tile, values[0])
