"""AMX: eight tiles of 16 rows of 64 bytes, and products of whole tiles.

A product of a tile [16 rows, 64 bytes] with one of [16 rows of 4 bytes, 16] adds to 16 x 16 sums of
32 bits: four columns of bytes, or two of bfloat16, lie side by side in each element of the right
operand. One takes 16 cycles, four with sums of their own 64, in which two vector units can do 128
operations on 512 bits.

A process must ask Linux for tiles once, before it starts threads:
``syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)``, which on x86-64 is
``syscall(158, 0x1023, 18)``.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from llmopt.backends.tvm.kernels.script import Expr, T, serial

HIGH: Final = 16
"""Rows in a tile."""
Place = tuple[Expr, ...]
_PALETTE: Final = 1


class Tiles(Protocol):
    """Eight tiles: 0 to 3 are sums, 4 and 5 left operands, 6 and 7 right ones."""

    def configure(self, depth: int = 64) -> None:
        """Set the sizes of the tiles for rows of ``depth`` bytes of the left operand."""

    def zero(self, tile: int) -> None:
        """Set sums to zero."""

    def load(self, tile: int, buffer: Any, index: Place, stride: int) -> None:
        """Read a tile whose rows are ``stride`` bytes apart."""

    def multiply(self, sums: int, left: int, right: int) -> None:
        """Add the products of signed bytes to sums of int32."""

    def multiply_halves(self, sums: int, left: int, right: int) -> None:
        """Add the products of bfloat16 to sums of float32."""

    def store(self, tile: int, buffer: Any, index: Place, stride: int) -> None:
        """Write sums."""

    def release(self) -> None:
        """Leave the processor as it was, so that others need not save the tiles."""


class Intrinsics:
    """The tiles of the processor."""

    def configure(self, depth: int = 64) -> None:
        """Set the sizes of the tiles for rows of ``depth`` bytes of the left operand."""
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

    def load(self, tile: int, buffer: Any, index: Place, stride: int) -> None:
        """Read a tile whose rows are ``stride`` bytes apart."""
        _emit("tileloadd64", T.int8(tile), T.address_of(buffer[index]), T.int64(stride))

    def multiply(self, sums: int, left: int, right: int) -> None:
        """Add the products of signed bytes to sums of int32."""
        _emit("tdpbssd", T.int8(sums), T.int8(left), T.int8(right))

    def multiply_halves(self, sums: int, left: int, right: int) -> None:
        """Add the products of bfloat16 to sums of float32."""
        _emit("tdpbf16ps", T.int8(sums), T.int8(left), T.int8(right))

    def store(self, tile: int, buffer: Any, index: Place, stride: int) -> None:
        """Write sums."""
        _emit("tilestored64", T.int8(tile), T.address_of(buffer[index]), T.int64(stride))

    def release(self) -> None:
        """Leave the processor as it was, so that others need not save the tiles."""
        _emit("tilerelease")


def _emit(name: str, *operands: Expr) -> None:
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *operands))


def four_products(unit: Tiles, *, halves: bool) -> None:
    """Emit the products of two left operands with two right ones."""
    multiply = unit.multiply_halves if halves else unit.multiply
    for sums, (left, right) in enumerate(((4, 6), (4, 7), (5, 6), (5, 7))):
        multiply(sums, left, right)
