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

Where an instruction multiplies two rows with two outputs, eight columns deep, the sums of two rows
lie in pairs of outputs as long as a block lasts::

    of rows r0 and r1    r0 | o0 o1 o2 o3        to r0o0 r0o1 r1o0 r1o1
                         r1 | o0 o1 o2 o3           r0o2 r0o3 r1o2 r1o3

and the four bytes of four outputs in two neighbouring quads are zipped to eight of each output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmopt.backends.tvm.kernels.linear.codes import four_codes
from llmopt.backends.tvm.kernels.linear.products import DotProducts
from llmopt.backends.tvm.kernels.linear.quantize import Activations
from llmopt.backends.tvm.kernels.linear.storage import TILE, Storage
from llmopt.backends.tvm.kernels.script import (
    Expr,
    Register,
    bind,
    bits,
    cast,
    integer,
    load,
    number,
    serial,
    splat,
)
from llmopt.backends.tvm.kernels.vectors import shuffled

Vectors = list[list[Expr]]


@dataclass(frozen=True)
class Tile:
    """What a tile is computed from.

    Args:
        storage: Layout of the weights.
        products: Integer products of this processor.
        activations: The rounded rows.
        buffers: ``codes``, ``scale`` and, with zero points, ``zero_point``.
    """

    storage: Storage
    products: DotProducts
    activations: Activations
    buffers: Mapping[str, Any]

    def emit(self, rows: Sequence[Expr], tile: Expr, width: int) -> Vectors:
        """Emit the products of ``rows`` with a tile.

        Args:
            rows: The rows' numbers.
            tile: The tile's number.
            width: Number of outputs in a step: 8, 16 or 32.

        Returns:
            The vectors of each row.
        """
        kind = _PairedTile if self.products.pair and len(rows) > 1 else _RegisterTile
        runs = [
            kind(self, rows, tile, range(at, at + width)).emit() for at in range(0, TILE, width)
        ]
        return [[vector for run in runs for vector in run[i]] for i in range(len(rows))]


class _RegisterTile:
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
        return self._chunks(
            block, [[self._start(row, block) for _ in self.places] for row in self.rows]
        )

    def _chunks(self, block: Expr, start: Vectors) -> Vectors:
        """Emit the products of one block, added to ``start``."""
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


class _PairedTile(_RegisterTile):
    """The same, two rows and two outputs in one instruction; there are as many rows as pairs."""

    def _chunks(self, block: Expr, start: Vectors) -> Vectors:
        return _exchanged(super()._chunks(block, _exchanged(start)))

    def _chunk(self, chunk: Expr, sums: Vectors) -> Vectors:
        for octet in range(self.chunk // 8):
            sums = self._octet(chunk, octet, sums)
        return sums

    def _octet(self, chunk: Expr, octet: int, sums: Vectors) -> Vectors:
        """Emit the products of eight columns."""
        multiply = self.tile.products.pair
        assert multiply is not None
        outputs = [self._outputs(at, chunk, octet) for at in self.places]
        place = chunk * (self.chunk // 4) + 2 * octet
        found = []
        for i in range(0, len(sums), 2):
            x = bind(self._two_rows(self.rows[i], self.rows[i + 1], place))
            found += [
                [
                    bind(multiply(v, x, w[half]))
                    for v, w in zip(sums[i + half], outputs, strict=True)
                ]
                for half in (0, 1)
            ]
        return found

    def _two_rows(self, first: Expr, second: Expr, offset: Expr) -> Expr:
        """Return eight codes of one row and eight of another."""
        codes = self.tile.activations.codes
        words = [load(codes, [row, offset], 2) for row in (first, second)]
        return bits("int8", shuffled(words[0], words[1], [0, 1, 2, 3]), 16)

    def _outputs(self, at: int, chunk: Expr, octet: int) -> list[Expr]:
        """Return eight codes of outputs 0 and 1, and of 2 and 3."""
        even, odd = (bind(self._weights(at, chunk, 2 * octet + i)) for i in (0, 1))
        zips = ([0, 4, 1, 5], [2, 6, 3, 7])
        return [bind(bits("int8", shuffled(even, odd, lanes), 16)) for lanes in zips]


def _exchanged(sums: Vectors) -> Vectors:
    """Return the sums of rows as those of pairs, or the other way: it is the same exchange."""
    return [
        [bind(shuffled(*both, lanes)) for both in zip(*pair, strict=True)]
        for pair in zip(sums[::2], sums[1::2], strict=True)
        for lanes in ([0, 1, 4, 5], [2, 3, 6, 7])
    ]


def _values(registers: list[list[Register]]) -> Vectors:
    return [[register.get() for register in row] for row in registers]


def _add(registers: list[list[Register]], values: Vectors) -> None:
    _each(registers, lambda register, at: register.set(register.get() + values[at[0]][at[1]]))


def _each(registers: list[list[Register]], do: Callable[[Register, tuple[int, int]], None]) -> None:
    for i, row in enumerate(registers):
        for j, register in enumerate(row):
            do(register, (i, j))
