"""Products with float32 weights: one row for decoding, many for prefill and encoders.

Weights are [G, K, 16]: for each column the 16 outputs of a group are one vector of 512 bits, two
of 256, four of 128. One row is read as it is. Of many rows, those that are computed together are
first laid out by column, so that a step reads neighbours and no two rows compete for one place
of the cache::

    x [M, K]  ->  [M / R, K, R]        step k:   result[r, :] += x[k, r] * weights[k, :]

R rows times 32 outputs stay in registers with AVX-512 (12 * 2), 16 outputs with shorter vectors.

Roofline: one row: memory, 4 bytes for each product. Many: multiply-adds; with AVX-512 24 of them
a step, beside two loads of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels.linear_epilogue import Epilogue
from llmopt.backends.tvm.kernels.linear_gemm import each_piece
from llmopt.backends.tvm.kernels.linear_script import (
    Expr,
    Register,
    T,
    bind,
    load,
    number,
    parallel,
    serial,
    splat,
    store,
    when,
)
from llmopt.backends.tvm.kernels.linear_storage import GROUPS, LANES, groups

_UNROLLED: Final = 4  # columns in straight code
Place = tuple[Expr, int]


def emit_row(buffers: Mapping[str, Any], epilogue: Epilogue, k: int, features: Features) -> None:
    """Emit the kernel of one row: ``x`` [1, K], ``weights``, ``y`` [1, N]."""
    row, lanes = T.int64(0), features.lanes
    tiles = groups(epilogue.n, paired=epilogue.paired) // GROUPS

    def x(_: int, column: Expr) -> Expr:
        return load(buffers["x"], [row, column], 1)

    with parallel(T.int64(tiles)) as tile:
        places = _places(tile, range(GROUPS), lanes)
        values = _sums(buffers["weights"], places, (1, k, lanes), x)[0]
        epilogue.write(row, tile, _by_group(values))


def emit_rows(buffers: Mapping[str, Any], epilogue: Epilogue, k: int, features: Features) -> None:
    """Emit the kernel of many rows: ``x`` [M, K], ``weights``, ``y`` [M, N]."""
    lanes = features.lanes
    together = 2 if features.avx512 else 1
    at_once = 12 if features.avx512 else 6 if features.avx2 or features.neon else 2
    m = buffers["x"].shape[0]
    packed = _by_column(buffers["x"], at_once, k)
    tiles = groups(epilogue.n, paired=epilogue.paired) // GROUPS

    def piece(first: Expr, tile: Expr) -> None:
        part = bind(T.floordiv(first, at_once))

        def x(row: int, column: Expr) -> Expr:
            return load(packed, [part, column, row], 1)

        values: list[list[Expr]] = [[] for _ in range(at_once)]
        for start in range(0, GROUPS, together):
            places = _places(tile, range(start, start + together), lanes)
            found = _sums(buffers["weights"], places, (at_once, k, lanes), x)
            for row, vectors in zip(values, found, strict=True):
                row.extend(vectors)
        for i, vectors in enumerate(values):
            with when(first + i < m):
                epilogue.write(first + i, tile, _by_group(vectors))

    each_piece(m, tiles, at_once, piece)


def _by_column(x: Any, at_once: int, k: int) -> Any:
    """Emit the copy of ``x`` [M, K] as [M / R, K, R]; the last row fills the last part."""
    m = x.shape[0]
    parts = T.floordiv(m + at_once - 1, at_once)
    packed = T.alloc_buffer((parts, k, at_once), "float32")
    with parallel(parts) as part:
        rows = [bind(T.min(part * at_once + i, m - 1)) for i in range(at_once)]
        with serial(k) as column:
            for i, row in enumerate(rows):
                store(packed, [part, column, i], load(x, [row, column], 1), 1)
    return packed


def _places(tile: Expr, which: range, lanes: int) -> list[Place]:
    return [(tile * GROUPS + g, at) for g in which for at in range(0, LANES, lanes)]


def _by_group(vectors: Sequence[Expr]) -> list[list[Expr]]:
    size = len(vectors) // GROUPS
    return [list(vectors[start : start + size]) for start in range(0, len(vectors), size)]


def _sums(
    weights: Any,
    places: Sequence[Place],
    sizes: tuple[int, int, int],
    x: Callable[[int, Expr], Expr],
) -> list[list[Expr]]:
    """Emit sums over columns and return, of each row, a vector for each place.

    Args:
        weights: [G, K, 16] float32.
        places: Group and first lane of each vector.
        sizes: Rows, columns and lanes.
        x: Row and column to a number.
    """
    rows, k, lanes = sizes
    registers = [[Register(lanes) for _ in places] for _ in range(rows)]
    for row in registers:
        for register in row:
            register.set(number(0, lanes))

    def step(column: Expr) -> None:
        vectors = [bind(load(weights, [group, column, at], lanes)) for group, at in places]
        for i, row in enumerate(registers):
            value = bind(splat(x(i, column), lanes))
            for register, vector in zip(row, vectors, strict=True):
                register.set(register.get() + value * vector)

    each_column(k, step)
    return [[register.get() for register in row] for row in registers]


def each_column(k: int, step: Callable[[Expr], None]) -> None:
    """Emit ``step`` for each column, some at a time."""
    whole, spare = divmod(k, _UNROLLED)
    if whole:
        with serial(whole) as index:
            for i in range(_UNROLLED):
                step(index * _UNROLLED + i)
    for i in range(spare):
        step(whole * _UNROLLED + i)
