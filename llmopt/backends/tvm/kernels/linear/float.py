"""Products in float32, of weights in float32 or bfloat16: one row for decoding, many for others.

Weights are [T, K, 32]: for each column the 32 outputs of a tile are two vectors of 512 bits, four
of 256, eight of 128. One row is read as it is. Of many rows, those that are computed together are
first laid out by column, so that a step reads neighbours and no two rows compete for one place
of the cache::

    x [M, K]  ->  [M / R, K, R]        step k:   result[r, :] += x[k, r] * weights[k, :]

Weights of bfloat16, [T, K'/2, 32] pairs, are widened in registers: a number is the upper half of
the float32 that it is, so the first of a pair is moved up, and of the second the rest masked out.

R rows times 32 outputs stay in registers with AVX-512 (8 * 2), 16 outputs with shorter vectors.

Roofline: one row: memory, 4 bytes for each product, or 2. Many: multiply-adds; with AVX-512 16 of
them a step, beside two loads of weights, or one and two operations that widen it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels.linear.epilogue import Epilogue
from llmopt.backends.tvm.kernels.linear.gemm import Step, each_piece
from llmopt.backends.tvm.kernels.linear.storage import HALF, TILE, tiles
from llmopt.backends.tvm.kernels.script import (
    Expr,
    Register,
    T,
    bind,
    bits,
    integer,
    load,
    number,
    parallel,
    prefetch,
    serial,
    splat,
    store,
    when,
)

_UNROLLED: Final = 4  # columns in straight code
_AHEAD: Final = 64
"""Pairs of bfloat16 before which a single row asks for theirs: widening leaves less of what follows
in the processor's window, and memory would wait. On Sapphire Rapids it is 30 to 40 % faster."""


def emit_row(buffers: Mapping[str, Any], epilogue: Epilogue, k: int, features: Features) -> None:
    """Emit the kernel of one row: ``x`` [1, K], ``weights``, ``y`` [1, N]."""
    row, lanes = T.int64(0), features.lanes

    def x(_: int, column: Expr) -> Expr:
        return load(buffers["x"], [row, column], 1)

    with parallel(T.int64(tiles(epilogue.n, paired=epilogue.paired))) as tile:
        values = _sums((buffers["weights"], tile), range(0, TILE, lanes), (1, k, lanes), x)
        epilogue.write(row, tile, values[0])


def emit_rows(buffers: Mapping[str, Any], epilogue: Epilogue, k: int, features: Features) -> None:
    """Emit the kernel of many rows: ``x`` [M, K], ``weights``, ``y`` [M, N]."""
    lanes = features.lanes
    width = TILE if features.avx512 else HALF
    at_once = 8 if features.avx512 else 6 if features.avx2 or features.neon else 2
    m = buffers["x"].shape[0]
    packed = _by_column(buffers["x"], at_once, k)

    def begin(tile: Expr) -> Step:
        def step(first: Expr) -> None:
            part = bind(T.floordiv(first, at_once))

            def x(row: int, column: Expr) -> Expr:
                return load(packed, [part, column, row], 1)

            values: list[list[Expr]] = [[] for _ in range(at_once)]
            for start in range(0, TILE, width):
                places = range(start, start + width, lanes)
                found = _sums((buffers["weights"], tile), places, (at_once, k, lanes), x)
                for row, vectors in zip(values, found, strict=True):
                    row.extend(vectors)
            for i, vectors in enumerate(values):
                with when(first + i < m):
                    epilogue.write(first + i, tile, vectors)

        return step

    each_piece(m, tiles(epilogue.n, paired=epilogue.paired), at_once, begin)


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


def _sums(
    weights: tuple[Any, Expr],
    columns_at_once: range,
    sizes: tuple[int, int, int],
    x: Callable[[int, Expr], Expr],
) -> list[list[Expr]]:
    """Emit sums over columns and return, of each row, a vector for each place.

    Args:
        weights: [T, K, 32] float32 or [T, K'/2, 32] pairs of bfloat16, and the tile.
        columns_at_once: Outputs of the tile at which vectors begin.
        sizes: Rows, columns and lanes.
        x: Row and column to a number.
    """
    rows, _, lanes = sizes
    registers = [[Register(lanes) for _ in columns_at_once] for _ in range(rows)]
    for row in registers:
        for register in row:
            register.set(number(0, lanes))

    def step(column: Expr, vectors: list[Expr]) -> None:
        for i, row in enumerate(registers):
            value = bind(splat(x(i, column), lanes))
            for register, vector in zip(row, vectors, strict=True):
                register.set(register.get() + value * vector)

    _each_column(weights, columns_at_once, sizes, step)
    return [[register.get() for register in row] for row in registers]


def _each_column(
    weights: tuple[Any, Expr],
    columns_at_once: range,
    sizes: tuple[int, int, int],
    step: Callable[[Expr, list[Expr]], None],
) -> None:
    """Emit ``step`` for each column, with its weights in float32."""
    (buffer, tile), (rows, k, lanes) = weights, sizes

    def vectors(line: Expr) -> list[Expr]:
        return [bind(load(buffer, [tile, line, at], lanes)) for at in columns_at_once]

    def pair(line: Expr) -> None:
        if rows == 1:
            for at in (0, HALF):
                prefetch(buffer, (tile, line + _AHEAD, at), near=2)
        both = vectors(line)
        step(2 * line, [bind(_first(vector, lanes)) for vector in both])
        step(2 * line + 1, [bind(_second(vector, lanes)) for vector in both])

    if str(buffer.ty.dtype) == "float32":
        each_column(k, lambda column: step(column, vectors(column)))
        return
    each_column(k // 2, pair)
    if k % 2:
        step(k - 1, [bind(_first(vector, lanes)) for vector in vectors(k // 2)])


def _first(pair: Expr, lanes: int) -> Expr:
    """Return the first of two bfloat16, widened."""
    return bits("float32", pair << integer(16, lanes), lanes)


def _second(pair: Expr, lanes: int) -> Expr:
    """Return the second of two bfloat16, widened."""
    return bits("float32", pair & integer(-0x10000, lanes), lanes)


def each_column(k: int, step: Callable[[Expr], None]) -> None:
    """Emit ``step`` for each column, some at a time."""
    whole, spare = divmod(k, _UNROLLED)
    if whole:
        with serial(whole) as index:
            for i in range(_UNROLLED):
                step(index * _UNROLLED + i)
    for i in range(spare):
        step(whole * _UNROLLED + i)
