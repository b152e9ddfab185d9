"""Activations to int8 codes with one scale a group, where they stay for the products that follow.

A row x [K] of float32, a group of it at a time, which is one block of the weights or several
(`Storage.shared`, or what a kernel asks for)::

    scale = max |x| / 127        code = round(x * (127 / max |x|)), half to even

The scale depends on that row alone. A group below 1e-30 is zeros. Codes are padded with zeros to
K'. The products need the sum of each block's codes as well: it corrects for the codes of weights
having their zero elsewhere.

Roofline: memory; M * K * 5 bytes are moved once, against M * N * K products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from llmopt.backends.tvm.kernels.linear.storage import Storage
from llmopt.backends.tvm.kernels.script import (
    Expr,
    Register,
    T,
    bind,
    bits,
    cast,
    integer,
    intrinsic,
    load,
    number,
    serial,
    splat,
    store,
    typed,
)

TINY: Final = 1e-30
_LANES: Final = 16  # LLVM splits them where a processor's vectors are shorter
_UNROLLED: Final = 16  # vectors in a block up to which its code is straight
_HIGH: Final = 16  # rows in a tile
_QUADS: Final = 16  # four columns each, in a tile


@dataclass(frozen=True)
class Activations:
    """Rounded rows in the kernel's own memory.

    Args:
        codes: [M, K'/4] int32, four codes each; in tiles [M/16 * K'/64 * 16, 16], each tile's 16
            rows of 64 columns one after the other.
        scale: [M, groups] float32.
        correction: [M, blocks]: what starts the sums of a block, int32, or, where weights have
            zero points, the sum of the codes, float32; None where nothing is to correct.
        group: Columns that share a scale; the last may be fewer.
        tiles: Number of tiles in a row, where codes lie in tiles; 0 elsewhere.
    """

    codes: Any
    scale: Any
    correction: Any
    group: int
    tiles: int = 0

    def address(self, row: Expr, quad: Expr) -> tuple[Expr, Expr]:
        """Return where codes ``4 * quad`` and after of a row lie."""
        if not self.tiles:
            return row, quad
        tile = T.floordiv(row, _HIGH) * self.tiles + T.floordiv(quad, _QUADS)
        return tile * _HIGH + T.floormod(row, _HIGH), T.floormod(quad, _QUADS)


def allocate(m: Expr, storage: Storage) -> Activations:
    """Return memory for ``m`` rows, one after the other."""
    shape = (m, storage.blocks)
    correction = None
    if storage.zero_points or storage.middle:
        correction = T.alloc_buffer(shape, "float32" if storage.zero_points else "int32")
    codes = T.alloc_buffer((m, storage.columns // 4), "int32")
    scale = T.alloc_buffer((m, storage.blocks // storage.shared), "float32")
    return Activations(codes, scale, correction, storage.block * storage.shared)


def allocate_tiles(m: Expr, columns: int, group: int) -> Activations:
    """Return memory for ``m`` rows, a multiple of 16, in tiles of 16 x 64 codes.

    Args:
        m: Number of rows.
        columns: Number of columns of a row, padded.
        group: Columns that share a scale.
    """
    count = -(-columns // (4 * _QUADS))
    codes = T.alloc_buffer((m * count, _QUADS), "int32")
    scale = T.alloc_buffer((m, -(-columns // group)), "float32")
    return Activations(codes, scale, None, group, count)


@dataclass(frozen=True)
class _Span:
    """Neighbours in a row.

    Args:
        x: [M, K] float32.
        row: Index of the row.
        start: The first column; the length of a block divides it.
        width: Number of columns.
    """

    x: Any
    row: Expr
    start: Expr
    width: int

    def vector(self, index: Expr, *, last: bool) -> Expr:
        """Return vector ``index``, zeros behind the width if it is the ``last``."""
        spare = self.width % _LANES
        at = self.start + index * _LANES
        if not (last and spare):
            return load(self.x, [self.row, at], _LANES)
        part = Register(_LANES)
        part.set(number(0, _LANES))
        for lane in range(spare):
            store(part.buffer, [lane], load(self.x, [self.row, at + lane], 1), 1)
        return part.get()


def quantize_row(x: Any, row: Expr, k: int, storage: Storage, into: Activations) -> None:
    """Emit the rounding of one row [K]."""
    length = into.group
    whole, spare = divmod(k, length)
    if whole == 1 and not spare:
        _quantize(_Span(x, row, 0, length), 0, storage, into)
        return
    if whole:
        with serial(whole) as index:
            _quantize(_Span(x, row, index * length, length), index, storage, into)
    if spare:
        _quantize(_Span(x, row, whole * length, spare), whole, storage, into)
    for column in range(storage.columns, into.tiles * 4 * _QUADS, _LANES):
        place = into.address(row, column // 4)
        store(into.codes, place, integer(0, _LANES // 4), _LANES // 4)


def _quantize(group: _Span, index: Expr, storage: Storage, into: Activations) -> None:
    """Emit the rounding of what shares a scale."""
    largest = bind(_largest(group))
    store(into.scale, [group.row, index], largest * number(1 / 127), 1)
    inverse = bind(
        T.Select(largest > number(TINY), number(127) / T.max(largest, number(TINY)), number(0))
    )
    if into.correction is None:
        padded = min(into.group, -(-group.width // storage.block) * storage.block)
        _store_codes(group, inverse, padded, into)
        return
    shared = into.group // storage.block
    for at in range(shared):
        start = at * storage.block
        width = min(storage.block, group.width - start)
        block = _Span(group.x, group.row, group.start + start, width)
        total = _store_codes(block, inverse, storage.block, into)
        known = (
            cast("float32", total, 1) if storage.zero_points else total * integer(-storage.middle)
        )
        store(into.correction, [group.row, index * shared + at], known, 1)


def _largest(run: _Span) -> Expr:
    """Return the largest magnitude; NaN if there is one, whose bits are larger than infinity's."""
    top = Register(_LANES, "int32")
    top.set(integer(0, _LANES))
    positive = integer(0x7FFFFFFF, _LANES)

    def see(index: Expr, *, last: bool) -> None:
        size = bits("int32", run.vector(index, last=last), _LANES) & positive
        top.set(T.max(top.get(), size))

    _each_vector(run.width, see)
    found = intrinsic("llvm.vector.reduce.smax", "int32", top.get())
    return bits("float32", found, 1)


def _store_codes(run: _Span, inverse: Expr, length: int, into: Activations) -> Expr:
    """Write the codes of a run, zeros up to a ``length``, and return their sum."""
    total = Register(_LANES, "int32")
    total.set(integer(0, _LANES))
    start = T.floordiv(run.start, 4) if not isinstance(run.start, int) else run.start // 4

    def write(index: Expr, value: Expr) -> None:
        packed = bits("int32", cast("int8", value, _LANES), _LANES // 4)
        place = into.address(run.row, start + index * (_LANES // 4))
        store(into.codes, place, packed, _LANES // 4)

    def see(index: Expr, *, last: bool) -> None:
        code = bind(_rounded(run.vector(index, last=last) * splat(inverse, _LANES)))
        total.set(total.get() + code)
        write(index, code)

    _each_vector(run.width, see)
    for index in range(-(-run.width // _LANES), length // _LANES):
        write(index, integer(0, _LANES))
    return bind(intrinsic("llvm.vector.reduce.add", "int32", total.get()))


def _rounded(value: Expr) -> Expr:
    return cast("int32", intrinsic("llvm.rint", typed("float32", _LANES), value), _LANES)


def _each_vector(width: int, see: Any) -> None:
    """Emit ``see`` for each vector of ``width`` elements."""
    whole, spare = divmod(width, _LANES)
    if whole <= _UNROLLED:
        for index in range(whole):
            see(index, last=False)
    else:
        with serial(whole) as index:
            see(index, last=False)
    if spare:
        see(whole, last=True)
