"""Activations to int8 codes with one scale a block, where they stay for the products that follow.

A row x [K] of float32, a block of it at a time::

    scale = max |x| / 127        code = round(x * (127 / max |x|)), half to even

The scale depends on that row alone. A block below 1e-30 is zeros. Codes are padded with zeros to
K'. The products need the sum of each block's codes as well: it corrects for the codes of weights
having their zero elsewhere.

Roofline: memory; M * K * 5 bytes are moved once, against M * N * K products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from llmopt.backends.tvm.kernels.linear_script import (
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
from llmopt.backends.tvm.kernels.linear_storage import Storage

TINY: Final = 1e-30
_UNROLLED: Final = 16  # vectors in a block up to which its code is straight


@dataclass(frozen=True)
class Activations:
    """Rounded rows in the kernel's own memory.

    Args:
        codes: [M, K'/4] int32, four codes each.
        scale: [M, blocks] float32.
        correction: [M, blocks]: what starts the sums of a block, int32, or, where weights have
            zero points, the sum of the codes, float32; None where nothing is to correct.
    """

    codes: Any
    scale: Any
    correction: Any


def allocate(m: Expr, storage: Storage) -> Activations:
    """Return memory for ``m`` rows."""
    shape = (m, storage.blocks)
    correction = None
    if storage.zero_points or storage.middle:
        correction = T.alloc_buffer(shape, "float32" if storage.zero_points else "int32")
    codes = T.alloc_buffer((m, storage.columns // 4), "int32")
    return Activations(codes, T.alloc_buffer(shape, "float32"), correction)


@dataclass(frozen=True)
class _Block:
    """What is rounded with one scale.

    Args:
        x: [M, K] float32.
        row: Which row.
        start: Its first column; the block's length divides it.
        width: How many of its columns there are, the rest being padding.
        lanes: Elements of a vector.
    """

    x: Any
    row: Expr
    start: Expr
    width: int
    lanes: int

    def vector(self, index: Expr, *, last: bool) -> Expr:
        """Return vector ``index``, zeros behind the width if it is the ``last``."""
        spare = self.width % self.lanes
        at = self.start + index * self.lanes
        if not (last and spare):
            return load(self.x, [self.row, at], self.lanes)
        part = Register(self.lanes)
        part.set(number(0, self.lanes))
        for lane in range(spare):
            store(part.buffer, [lane], load(self.x, [self.row, at + lane], 1), 1)
        return part.get()


def quantize_row(x: Any, row: Expr, k: int, storage: Storage, into: Activations) -> None:
    """Emit the rounding of one row [K]."""
    lanes = LANES_OF_CODES
    whole, spare = divmod(k, storage.block)
    if whole == 1 and not spare:
        _quantize(_Block(x, row, 0, storage.block, lanes), 0, storage, into)
        return
    if whole:
        with serial(whole) as index:
            block = _Block(x, row, index * storage.block, storage.block, lanes)
            _quantize(block, index, storage, into)
    if spare:
        block = _Block(x, row, whole * storage.block, spare, lanes)
        _quantize(block, whole, storage, into)


LANES_OF_CODES: Final = 16
"""LLVM splits vectors of 16 where a processor's are shorter."""


def _quantize(block: _Block, index: Expr, storage: Storage, into: Activations) -> None:
    largest = bind(_largest(block))
    scale = largest * number(1 / 127)
    inverse = bind(
        T.Select(largest > number(TINY), number(127) / T.max(largest, number(TINY)), number(0))
    )
    store(into.scale, [block.row, index], scale, 1)
    total = _store_codes(block, inverse, storage.block, into.codes)
    if into.correction is not None:
        known = (
            cast("float32", total, 1) if storage.zero_points else total * integer(-storage.middle)
        )
        store(into.correction, [block.row, index], known, 1)


def _largest(block: _Block) -> Expr:
    """Return the largest magnitude; NaN if there is one, whose bits are larger than infinity's."""
    lanes = block.lanes
    top = Register(lanes, "int32")
    top.set(integer(0, lanes))
    positive = integer(0x7FFFFFFF, lanes)

    def see(index: Expr, *, last: bool) -> None:
        size = bits("int32", block.vector(index, last=last), lanes) & positive
        top.set(T.max(top.get(), size))

    _each_vector(block.width, lanes, see)
    found = intrinsic("llvm.vector.reduce.smax", "int32", top.get())
    return bits("float32", found, 1)


def _store_codes(block: _Block, inverse: Expr, length: int, codes: Any) -> Expr:
    """Write the codes of a block and return their sum."""
    lanes = block.lanes
    total = Register(lanes, "int32")
    total.set(integer(0, lanes))
    start = T.floordiv(block.start, 4) if not isinstance(block.start, int) else block.start // 4

    def write(index: Expr, value: Expr) -> None:
        packed = bits("int32", cast("int8", value, lanes), lanes // 4)
        store(codes, [block.row, start + index * (lanes // 4)], packed, lanes // 4)

    def see(index: Expr, *, last: bool) -> None:
        code = bind(_rounded(block.vector(index, last=last) * splat(inverse, lanes), lanes))
        total.set(total.get() + code)
        write(index, code)

    _each_vector(block.width, lanes, see)
    for index in range(-(-block.width // lanes), length // lanes):
        write(index, integer(0, lanes))
    return bind(intrinsic("llvm.vector.reduce.add", "int32", total.get()))


def _rounded(value: Expr, lanes: int) -> Expr:
    return cast("int32", intrinsic("llvm.rint", typed("float32", lanes), value), lanes)


def _each_vector(width: int, lanes: int, see: Any) -> None:
    """Emit ``see`` for each vector of ``width`` elements."""
    whole, spare = divmod(width, lanes)
    if whole <= _UNROLLED:
        for index in range(whole):
            see(index, last=False)
    else:
        with serial(whole) as index:
            see(index, last=False)
    if spare:
        see(whole, last=True)
