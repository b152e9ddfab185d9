"""A tile of a product with integer weights: some rows of activations times 32 outputs.

For each block of columns the sums of integer products stay in registers, and the scales of the
weights and of the activations are applied once::

    for group of blocks whose activations share a scale:
        for block:                                   x codes   int8 [rows, K']
            sums = correction of the block           weights   [K'/8, 32] int32
            for 4 columns:
                weights -> vectors of four bytes
                sums += weights * activations        one instruction for lanes * 4 products
            part += float(sums) * scale of weights
        result += part * scale of activations

Registers: rows * vectors of sums and as many of parts, the weights and a mask; results wait in
memory. With AVX-512 all 32 outputs go at once, two vectors; with shorter vectors one half after
the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmopt.backends.tvm.kernels.linear_codes import four_codes
from llmopt.backends.tvm.kernels.linear_products import Products
from llmopt.backends.tvm.kernels.linear_quantize import Activations
from llmopt.backends.tvm.kernels.linear_script import (
    Expr,
    Register,
    bind,
    cast,
    integer,
    load,
    number,
    serial,
    splat,
)
from llmopt.backends.tvm.kernels.linear_storage import TILE, Storage

Vectors = list[list[Expr]]


@dataclass(frozen=True)
class Tile:
    """What a tile is computed from.

    Args:
        storage: How the weights are stored.
        products: How integers are multiplied here.
        activations: The rounded rows.
        buffers: ``codes``, ``scale`` and, with zero points, ``zero_point``.
    """

    storage: Storage
    products: Products
    activations: Activations
    buffers: Mapping[str, Any]

    def emit(self, rows: Sequence[Expr], tile: Expr, width: int) -> Vectors:
        """Emit the products of ``rows`` with a tile.

        Args:
            rows: The rows' numbers.
            tile: The tile's number.
            width: How many outputs are computed at once, 16 or 32.

        Returns:
            The vectors of each row.
        """
        runs = [
            _Run(self, rows, tile, range(at, at + width)).emit() for at in range(0, TILE, width)
        ]
        return [[vector for run in runs for vector in run[i]] for i in range(len(rows))]


class _Run:
    """The outputs that are computed at once, and their registers."""

    def __init__(self, of: Tile, rows: Sequence[Expr], tile: Expr, outputs: range) -> None:
        self.tile = of
        self.rows = rows
        self.number = tile
        self.lanes = of.products.lanes
        self.places = outputs[:: self.lanes]
        self.chunk = min(max(of.products.straight, of.storage.unit), of.storage.block)

    def emit(self) -> Vectors:
        """Emit the loop over groups and return the vectors of each row."""
        storage = self.tile.storage
        groups = storage.blocks // storage.shared
        if groups == 1:
            return self._times(0, self._group(0))
        results = self._registers("float32")
        _each(results, lambda register, _: register.set(number(0, self.lanes)))
        with serial(groups) as group:
            _add(results, self._times(group, self._group(group)))
        return _values(results)

    def _group(self, group: Expr) -> Vectors:
        """Emit the products of the blocks whose activations share a scale."""
        shared = self.tile.storage.shared
        if shared == 1:
            return self._scaled(group, self._sums(group))
        parts = self._registers("float32")
        _each(parts, lambda register, _: register.set(number(0, self.lanes)))
        with serial(shared) as index:
            block = bind(group * shared + index)
            _add(parts, self._scaled(block, self._sums(block)))
        return _values(parts)

    def _times(self, group: Expr, parts: Vectors) -> Vectors:
        """Return the vectors of each row times the scale of its activations."""
        scale = self.tile.activations.scale
        factors = [bind(splat(load(scale, [row, group], 1), self.lanes)) for row in self.rows]
        return [[x * f for x in row] for row, f in zip(parts, factors, strict=True)]

    def _registers(self, dtype: str) -> list[list[Register]]:
        return [[Register(self.lanes, dtype) for _ in self.places] for _ in self.rows]

    def _sums(self, block: Expr) -> Vectors:
        """Emit the integer sums of one block."""
        start = [[self._start(row, block) for _ in self.places] for row in self.rows]
        chunks = self.tile.storage.block // self.chunk
        if chunks == 1:
            return self._chunk(block, start)
        sums = self._registers("int32")
        _each(sums, lambda register, at: register.set(start[at[0]][at[1]]))
        with serial(chunks) as index:
            then = self._chunk(block * chunks + index, _values(sums))
            _each(sums, lambda register, at: register.set(then[at[0]][at[1]]))
        return _values(sums)

    def _start(self, row: Expr, block: Expr) -> Expr:
        correction = self.tile.activations.correction
        if correction is None or self.tile.storage.zero_points:
            return integer(0, self.lanes)
        return splat(load(correction, [row, block], 1), self.lanes)

    def _chunk(self, chunk: Expr, sums: Vectors) -> Vectors:
        """Emit the products of ``self.chunk`` columns."""
        products = self.tile.products
        quads = self.chunk // 4
        for first in range(0, quads, products.depth):
            partial = [[products.start(value) for value in row] for row in sums]
            for quad in range(first, min(quads, first + products.depth)):
                partial = self._quad(chunk, quad, partial)
            sums = [
                [bind(products.finish(*pair)) for pair in zip(*both, strict=True)]
                for both in zip(sums, partial, strict=True)
            ]
        return sums

    def _quad(self, chunk: Expr, quad: int, partial: Vectors) -> Vectors:
        """Emit the products of four columns."""
        codes = self.tile.activations.codes
        weights = [bind(self._weights(at, chunk, quad)) for at in self.places]
        result = []
        for row, values in zip(self.rows, partial, strict=True):
            word = load(codes, [row, chunk * (self.chunk // 4) + quad], 1)
            x = bind(splat(word, self.lanes))
            step = self.tile.products.step
            result.append([bind(step(v, w, x)) for v, w in zip(values, weights, strict=True)])
        return result

    def _weights(self, at: int, chunk: Expr, quad: int) -> Expr:
        """Return four bytes a lane: the codes of four columns."""
        storage = self.tile.storage
        unit, quad = divmod(quad, storage.unit // 4)
        first = (chunk * (self.chunk // storage.unit) + unit) * storage.words

        def word(index: int) -> Expr:
            return load(self.tile.buffers["codes"], [self.number, first + index, at], self.lanes)

        return four_codes(storage, quad, word, self.lanes)

    def _scaled(self, block: Expr, sums: Vectors) -> Vectors:
        """Return the sums of a block as numbers, but for the scale of the activations."""
        activations = self.tile.activations
        scales = [bind(self._scale(at, block)) for at in self.places]
        zeros = self._zeros(block)
        result = []
        for row, values in zip(self.rows, sums, strict=True):
            numbers = [cast("float32", value, self.lanes) for value in values]
            if zeros:
                total = bind(splat(load(activations.correction, [row, block], 1), self.lanes))
                numbers = [x - zero * total for x, zero in zip(numbers, zeros, strict=True)]
            result.append([x * s for x, s in zip(numbers, scales, strict=True)])
        return result

    def _scale(self, at: int, block: Expr) -> Expr:
        value = load(self.tile.buffers["scale"], [self.number, block, at], self.lanes)
        return value if self.tile.storage.scale == "float32" else cast("float32", value, self.lanes)

    def _zeros(self, block: Expr) -> list[Expr]:
        """Return the zero points of a block as numbers, nothing where none are stored."""
        if not self.tile.storage.zero_points:
            return []
        points = self.tile.buffers["zero_point"]
        loaded = [load(points, [self.number, block, at], self.lanes) for at in self.places]
        return [bind(cast("float32", cast("int32", p, self.lanes), self.lanes)) for p in loaded]


def _values(registers: list[list[Register]]) -> Vectors:
    return [[register.get() for register in row] for row in registers]


def _add(registers: list[list[Register]], values: Vectors) -> None:
    _each(registers, lambda register, at: register.set(register.get() + values[at[0]][at[1]]))


def _each(registers: list[list[Register]], do: Callable[[Register, tuple[int, int]], None]) -> None:
    for i, row in enumerate(registers):
        for j, register in enumerate(row):
            do(register, (i, j))
