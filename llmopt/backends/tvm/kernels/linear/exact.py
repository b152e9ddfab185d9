"""Float activations times integer weights, for verification: what is rounded is the weights.

Codes are turned into numbers in registers, one column at a time::

    lane of 32 bits -> shift, mask -> code of column k -> (code - zero) * scale -> times x[m, k]

Roofline: conversions, four instructions for each vector of weights, shared by 4 rows. It need
not be fast: it proves the graph and the packing to the tolerance of float32, which the integer
kernels, exact on integers, then share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from llmopt.backends.tvm.kernels.linear.codes import four_codes
from llmopt.backends.tvm.kernels.linear.epilogue import Epilogue
from llmopt.backends.tvm.kernels.linear.gemm import Step, each_piece
from llmopt.backends.tvm.kernels.linear.storage import HALF, TILE, Storage, tiles
from llmopt.backends.tvm.kernels.script import (
    Expr,
    Register,
    T,
    bind,
    cast,
    integer,
    load,
    number,
    serial,
    splat,
    when,
)

_AT_ONCE: Final = 4


def emit(
    buffers: Mapping[str, Any], epilogue: Epilogue, k: int, storage: Storage, lanes: int
) -> None:
    """Emit the kernel: ``x`` [M, K], the weight's arrays, ``y`` [M, N].

    Args:
        buffers: By name.
        epilogue: Epilogue of the product.
        k: Columns of the weight.
        storage: Layout of the weight.
        lanes: Lanes of the processor's vectors.
    """
    m = buffers["x"].shape[0]

    def begin(tile: Expr) -> Step:
        halves = [_Half(buffers, storage, (tile, at), lanes) for at in range(0, TILE, HALF)]

        def step(first: Expr) -> None:
            rows = [bind(T.min(first + i, m - 1)) for i in range(_AT_ONCE)]
            values = [half.sums(rows, k) for half in halves]
            for i in range(_AT_ONCE):
                with when(first + i < m):
                    epilogue.write(first + i, tile, [v for value in values for v in value[i]])

        return step

    each_piece(m, tiles(epilogue.n, paired=epilogue.paired), _AT_ONCE, begin)


class _Half:
    """Half of a tile, 16 outputs."""

    def __init__(
        self, buffers: Mapping[str, Any], storage: Storage, part: tuple[Expr, int], lanes: int
    ) -> None:
        self.buffers = buffers
        self.storage = storage
        self.tile, first = part
        self.lanes = lanes
        self.places = range(first, first + HALF, lanes)
        self.each = storage.unit

    def sums(self, rows: Sequence[Expr], k: int) -> list[list[Expr]]:
        """Emit the sums over columns and return the vectors of each row."""
        registers = [[Register(self.lanes) for _ in self.places] for _ in rows]
        for register in (one for row in registers for one in row):
            register.set(number(0, self.lanes))
        whole, spare = divmod(k, self.storage.block)
        if whole:
            with serial(whole) as block:
                self._block(block, self.storage.block, rows, registers)
        if spare:
            self._block(whole, spare, rows, registers)
        return [[register.get() for register in row] for row in registers]

    def _block(
        self, block: Expr, width: int, rows: Sequence[Expr], registers: list[list[Register]]
    ) -> None:
        scales = [bind(self._float("scale", block, at)) for at in self.places]
        zeros = [bind(self._zero(block, at)) for at in self.places]
        units, spare = divmod(width, self.each)

        def emit_unit(unit: Expr, columns: int) -> None:
            at_unit = block * (self.storage.block // self.each) + unit
            lanes = [self._lanes(at_unit, at) for at in self.places]
            for column in range(columns):
                numbers = [
                    bind((self._number(words, column) - zero) * scale)
                    for words, zero, scale in zip(lanes, zeros, scales, strict=True)
                ]
                self._add(at_unit * self.each + column, numbers, rows, registers)

        if units:
            with serial(units) as unit:
                emit_unit(unit, self.each)
        if spare:
            emit_unit(units, spare)

    def _add(
        self,
        column: Expr,
        numbers: Sequence[Expr],
        rows: Sequence[Expr],
        registers: list[list[Register]],
    ) -> None:
        for row, vectors in zip(rows, registers, strict=True):
            x = bind(splat(load(self.buffers["x"], [row, column], 1), self.lanes))
            for register, value in zip(vectors, numbers, strict=True):
                register.set(register.get() + x * value)

    def _lanes(self, unit: Expr, at: int) -> list[Expr]:
        first, codes = unit * self.storage.words, self.buffers["codes"]
        places = [[self.tile, first + i, at] for i in range(self.storage.words)]
        return [bind(load(codes, place, self.lanes)) for place in places]

    def _number(self, words: Sequence[Expr], column: int) -> Expr:
        """Return the code of one column of a unit as a number."""
        quad, byte = divmod(column, 4)
        codes = four_codes(self.storage, quad, words.__getitem__, self.lanes)
        if self.storage.signed:
            code = (codes << integer(24 - 8 * byte, self.lanes)) >> integer(24, self.lanes)
        else:
            code = (codes >> integer(8 * byte, self.lanes)) & integer(255, self.lanes)
        return cast("float32", code, self.lanes)

    def _zero(self, block: Expr, at: int) -> Expr:
        if not self.storage.zero_points:
            return number(self.storage.middle, self.lanes)
        points = load(self.buffers["zero_point"], [self.tile, block, at], self.lanes)
        return cast("float32", cast("int32", points, self.lanes), self.lanes)

    def _float(self, name: str, block: Expr, at: int) -> Expr:
        value = load(self.buffers[name], [self.tile, block, at], self.lanes)
        return value if self.storage.scale == "float32" else cast("float32", value, self.lanes)
