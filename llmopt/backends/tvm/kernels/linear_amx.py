"""Many rows times integer weights on AMX's tiles of 16 x 64 bytes.

A thread unpacks a tile of 32 weights' rows to bytes once and multiplies up to 256 rows of
activations with it, 32 at a time: four sums of 16 x 16, two tiles of activations, two of weights::

                      weights  [K'/4, 32] int32, four bytes a lane, minus their zero
                      ┌──────┬──────┐
                      │ 6    │ 7    │  16 lanes of 4 columns: 64 columns deep, or one block
          activations ├──────┼──────┤
           ┌──────┐   │ 0    │ 1    │  int32 [32, 32]
           │ 4    │   ├──────┼──────┤
           │ 5    │   │ 2    │ 3    │
           └──────┘   └──────┴──────┘

At the end of each block the sums are stored, turned into numbers, scaled and added up in memory
that stays in the first cache. Blocks of 8 bits with zero points do not fit a byte, and blocks of
16 leave three quarters of a tile empty: both use vectors instead.

Roofline: tiles multiply 64 columns of 32 x 32 results in 64 cycles. Scaling them takes 64 vectors
of three instructions and as many stores, some 100 cycles, once a block: so blocks of 128 come
nearer to the peak than those of 32, and int8 with one scale a row nearest.

A process must ask Linux for tiles once, before it starts threads:
``syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)``, which on x86-64 is
``syscall(158, 0x1023, 18)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

from llmopt.backends.tvm.kernels.linear_codes import four_codes
from llmopt.backends.tvm.kernels.linear_epilogue import Epilogue
from llmopt.backends.tvm.kernels.linear_gemm import Step, each_piece
from llmopt.backends.tvm.kernels.linear_quantize import Activations, allocate, quantize_row
from llmopt.backends.tvm.kernels.linear_script import (
    Expr,
    T,
    bind,
    bits,
    cast,
    integer,
    load,
    number,
    parallel,
    serial,
    splat,
    store,
)
from llmopt.backends.tvm.kernels.linear_storage import HALF, TILE, Storage, tiles

_LANES: Final = 16
_DEEP: Final = 64  # columns in a tile
_PALETTE: Final = 1


class Tiles(Protocol):
    """Eight tiles: 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights."""

    def configure(self, depth: int) -> None:
        """Set the sizes of the tiles for ``depth`` columns."""

    def zero(self, tile: int) -> None:
        """Set sums to zero."""

    def load(self, tile: int, buffer: Any, index: tuple[Expr, Expr], stride: int) -> None:
        """Read a tile whose rows are ``stride`` bytes apart."""

    def multiply(self, sums: int, activations: int, weights: int) -> None:
        """Add the products of signed bytes to sums."""

    def store(self, tile: int, buffer: Any, index: tuple[Expr, Expr], stride: int) -> None:
        """Write sums."""

    def release(self) -> None:
        """Leave the processor as it was, so that others need not save the tiles."""


class Intrinsics:
    """The tiles of the processor."""

    def configure(self, depth: int) -> None:
        """Set the sizes of the tiles for ``depth`` columns."""
        setup = T.alloc_buffer((64,), "uint8")
        with serial(64) as byte:
            T.buffer_store(setup, T.uint8(0), [byte])
        T.buffer_store(setup, T.uint8(_PALETTE), [0])
        for tile in range(8):
            columns = depth if tile in (4, 5) else 64
            T.buffer_store(setup, T.uint8(columns), [16 + 2 * tile])
            T.buffer_store(setup, T.uint8(depth // 4 if tile > 5 else 16), [48 + tile])
        _emit("ldtilecfg", T.address_of(setup[0]))

    def zero(self, tile: int) -> None:
        """Set sums to zero."""
        _emit("tilezero", T.int8(tile))

    def load(self, tile: int, buffer: Any, index: tuple[Expr, Expr], stride: int) -> None:
        """Read a tile whose rows are ``stride`` bytes apart."""
        _emit("tileloadd64", T.int8(tile), T.address_of(buffer[index]), T.int64(stride))

    def multiply(self, sums: int, activations: int, weights: int) -> None:
        """Add the products of signed bytes to sums."""
        _emit("tdpbssd", T.int8(sums), T.int8(activations), T.int8(weights))

    def store(self, tile: int, buffer: Any, index: tuple[Expr, Expr], stride: int) -> None:
        """Write sums."""
        _emit("tilestored64", T.int8(tile), T.address_of(buffer[index]), T.int64(stride))

    def release(self) -> None:
        """Leave the processor as it was, so that others need not save the tiles."""
        _emit("tilerelease")


def _emit(name: str, *operands: Expr) -> None:
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *operands))


def fits(storage: Storage) -> bool:
    """Return whether tiles multiply weights that are stored so."""
    return storage.block % TILE == 0 and not (storage.zero_points and storage.bits == 8)


@dataclass(frozen=True)
class _Product:
    """What one piece of the result is computed from.

    Args:
        buffers: The kernel's, by name.
        storage: How the weight is stored.
        activations: The rounded rows, padded to a multiple of 32.
        tiles: The processor's.
        epilogue: What follows.
    """

    buffers: Mapping[str, Any]
    storage: Storage
    activations: Activations
    tiles: Tiles
    epilogue: Epilogue

    AT_ONCE: ClassVar[int] = 32

    @property
    def depth(self) -> int:
        """Columns in a tile."""
        return min(_DEEP, self.storage.block)

    def unpack(self, tile: Expr) -> Any:
        """Emit the weights as signed bytes and return them, [K'/4, 32] int32."""
        storage = self.storage
        panel = T.alloc_buffer((storage.columns // 4, TILE), "int32")
        units = storage.block // storage.unit
        with serial(storage.blocks) as block:
            zeros = [bind(self._zero(tile, block, at)) for at in (0, HALF)]
            with serial(units) as unit:
                for at, zero in zip((0, HALF), zeros, strict=True):
                    self._unpack_unit(panel, (tile, bind(block * units + unit), at), zero)
        return panel

    def _unpack_unit(self, panel: Any, place: tuple[Expr, Expr, int], zero: Expr) -> None:
        storage, codes = self.storage, self.buffers["codes"]
        tile, unit, at = place
        words = [
            bind(load(codes, [tile, unit * storage.words + i, at], _LANES))
            for i in range(storage.words)
        ]
        quads = storage.unit // 4
        for quad in range(quads):
            value = four_codes(storage, quad, words.__getitem__, _LANES)
            store(panel, [unit * quads + quad, at], _minus(value, zero), _LANES)

    def _zero(self, tile: Expr, block: Expr, at: int) -> Expr:
        """Return the zero of 16 rows, in each of four bytes."""
        four = integer(0x01010101, _LANES)
        if not self.storage.zero_points:
            return integer(self.storage.middle, _LANES) * four
        points = load(self.buffers["zero_point"], [tile, block, at], _LANES)
        return cast("int32", points, _LANES) * four

    def rows(self, first: Expr, tile: Expr, panel: Any, scratch: tuple[Any, Any]) -> None:
        """Emit 32 rows of the result, or what there is of them."""
        sums, results = scratch
        there = bind(T.min(self.buffers["x"].shape[0] - first, T.int64(self.AT_ONCE)))
        with serial(self.storage.blocks) as block:
            self._multiply(first, block, panel, sums)
            self._add_scaled(first, tile, block, (there, sums, results))
        with serial(there) as row:
            vectors = [load(results, [row, at], _LANES) for at in (0, HALF)]
            self.epilogue.write(first + row, tile, vectors)

    def _multiply(self, first: Expr, block: Expr, panel: Any, sums: Any) -> None:
        """Emit the sums of one block."""
        unit = self.tiles
        for tile in range(4):
            unit.zero(tile)
        steps = self.storage.block // self.depth
        with serial(steps) as step:
            column = bind((block * steps + step) * (self.depth // 4))
            codes, apart = self.activations.codes, self.storage.columns
            unit.load(4, codes, (first, column), apart)
            unit.load(6, panel, (column, 0), 4 * TILE)
            unit.multiply(0, 4, 6)
            unit.load(7, panel, (column, HALF), 4 * TILE)
            unit.multiply(1, 4, 7)
            unit.load(5, codes, (first + 16, column), apart)
            unit.multiply(2, 5, 6)
            unit.multiply(3, 5, 7)
        for tile in range(4):
            unit.store(tile, sums, (16 * (tile // 2), 16 * (tile % 2)), 4 * TILE)

    def _add_scaled(
        self, first: Expr, tile: Expr, block: Expr, scratch: tuple[Expr, Any, Any]
    ) -> None:
        """Emit ``results += sums * scales`` for the rows that are there."""
        there, sums, results = scratch
        scales = [bind(self._scale(tile, block, at)) for at in (0, HALF)]
        group = T.floordiv(block, self.storage.shared)
        with serial(there) as row:
            factor = bind(splat(load(self.activations.scale, [first + row, group], 1), _LANES))
            for at, scale in zip((0, HALF), scales, strict=True):
                value = cast("float32", load(sums, [row, at], _LANES), _LANES) * (scale * factor)
                if self.storage.blocks > 1:
                    old = load(results, [row, at], _LANES)
                    value = value + T.Select(block > 0, old, number(0, _LANES))
                store(results, [row, at], value, _LANES)

    def _scale(self, tile: Expr, block: Expr, at: int) -> Expr:
        value = load(self.buffers["scale"], [tile, block, at], _LANES)
        return value if self.storage.scale == "float32" else cast("float32", value, _LANES)


def _minus(codes: Expr, zero: Expr) -> Expr:
    """Return four differences of bytes in each lane."""
    left, right = (bits("int8", value, 4 * _LANES) for value in (codes, zero))
    return bits("int32", left - right, _LANES)


def emit(
    buffers: Mapping[str, Any], epilogue: Epilogue, k: int, storage: Storage, unit: Tiles
) -> None:
    """Emit the kernel of many rows.

    Args:
        buffers: ``x`` [M, K], the weight's arrays, what the epilogue reads, ``y`` [M, N].
        epilogue: What follows.
        k: Columns of the weight.
        storage: How the weight is stored; see `fits`.
        unit: The processor's tiles.
    """
    m = buffers["x"].shape[0]
    at_once = _Product.AT_ONCE
    activations = allocate(T.floordiv(m + at_once - 1, at_once) * at_once, storage)
    with parallel(m) as row:
        quantize_row(buffers["x"], row, k, storage, activations)
    product = _Product(buffers, storage, activations, unit, epilogue)

    def begin(tile: Expr) -> Step:
        sums = T.alloc_buffer((at_once, TILE), "int32")
        results = T.alloc_buffer((at_once, TILE), "float32")
        panel = product.unpack(tile)
        unit.configure(product.depth)
        return lambda first: product.rows(first, tile, panel, (sums, results))

    count = tiles(epilogue.n, paired=epilogue.paired)
    each_piece(m, count, at_once, begin, unit.release)
