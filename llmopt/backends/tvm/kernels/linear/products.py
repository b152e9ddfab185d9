"""Sums of four int8 products in every lane: the one instruction that each processor does best.

A vector of L lanes holds, for L outputs, four neighbouring codes of their weights; the other
operand holds four neighbouring activations, the same in every lane::

    lane        n0            n1            ...
    weights     w00 w01 w02 w03 | w10 w11 w12 w13 | ...      four bytes a lane
    activations x0  x1  x2  x3  | x0  x1  x2  x3  | ...
    sums        + w00 x0 + w01 x1 + w02 x2 + w03 x3 | ...    int32

=================== ===== ============================================ ======================
features            lanes instructions for four products of a lane     weights
=================== ===== ============================================ ======================
avx512vnni          16    vpdpbusd                                     unsigned
avxvnni             8     vpdpbusd                                     unsigned
avx512, avx2        16, 8 vpmaddubsw, vpaddw; vpmaddwd, vpaddd once    unsigned, few bits
avx512, avx2        16, 8 vpabsb, vpsignb, vpmaddubsw, vpmaddwd        signed, eight bits
dotprod (arm64)     4     sdot                                         signed
i8mm (arm64)        2 x 2 smmla: eight products, of two rows, if many   signed
none                4     four times shift, multiply, add              signed
=================== ===== ============================================ ======================

``smmla`` multiplies a matrix [2 rows, 8 columns] with one of two outputs [2, 8]: twice the products
of ``sdot`` in as many instructions. Its sums are (r0 o0), (r0 o1), (r1 o0), (r1 o1).

All are exact: no sum of 16 bits can saturate. Weights of 4 bits are 0 … 15, and 8 sums of two
products stay below 2**15: 8 * 2 * 15 * 127; those of 6 bits are 0 … 63, depth 2; int8 codes
0 … 128, or signed with magnitudes up to 128, depth 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels.script import (
    Expr,
    T,
    bits,
    integer,
    intrinsic,
    splat,
    typed,
)


@dataclass(frozen=True)
class DotProducts:
    """How sums of products are made on one kind of processor.

    Args:
        lanes: Outputs in a vector.
        registers: Number of vector registers of the processor.
        straight: Number of columns that are worth straight code.
        depth: Number of groups of four that may be added between ``start`` and ``finish``.
        start: The sums so far [lanes] int32 to what ``step`` adds to.
        step: Function of a sum, weights and activations [lanes] int32 (four bytes a lane) to the
            next sum.
        finish: The sums so far and the last one to the sums.
        pair: Sums of two rows and two outputs [4] int32, eight activations of each row and eight
            codes of each output [16] int8 to the next sums; None where no instruction does that.
    """

    lanes: int
    registers: int
    straight: int
    depth: int
    start: Callable[[Expr], Expr]
    step: Callable[[Expr, Expr, Expr], Expr]
    finish: Callable[[Expr, Expr], Expr]
    pair: Callable[[Expr, Expr, Expr], Expr] | None = None


def products(features: Features, *, largest: int, signed: bool) -> DotProducts:
    """Return the fastest products that the features allow.

    Args:
        features: Features of the processor.
        largest: The largest stored code of a weight: 15, 63, 128 or 255.
        signed: Whether codes are stored signed, as `linear_storage` decides.
    """
    if features.dotprod:
        pair = smmla if features.i8mm else None
        return DotProducts(4, 32, 32, 8, _same, _sdot, _last, pair)
    if features.avx512vnni and not signed:
        return DotProducts(16, 32, 32, 64, _same, _vnni(16), _last)
    if features.avxvnni and not signed:
        return DotProducts(8, 16, 32, 64, _same, _vnni(8), _last)
    if features.avx2:
        lanes, registers = (16, 32) if features.avx512 else (8, 16)
        step = _signed_pairs(lanes) if signed else _pairs(lanes)
        depth = _most_sums(128 if signed else largest)
        return DotProducts(lanes, registers, 32, depth, _nothing, step, _widen(lanes))
    registers = 32 if features.neon else 16
    return DotProducts(4, registers, 8, 8, _same, _multiply(signed=signed), _last)


def _most_sums(largest: int) -> int:
    """Return how many sums of two products with int8 activations fit 16 bits.

    >>> _most_sums(15), _most_sums(63), _most_sums(128)
    (8, 2, 1)
    """
    return 32767 // (2 * 127 * largest)


def _same(total: Expr) -> Expr:
    return total


def _last(total: Expr, partial: Expr) -> Expr:  # noqa: ARG001 - the sums so far are in it
    return partial


def _nothing(total: Expr) -> Expr:  # noqa: ARG001 - sums of 16 bits begin at zero
    return None


def _vnni(lanes: int) -> Callable[[Expr, Expr, Expr], Expr]:
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"

    def step(total: Expr, weights: Expr, activations: Expr) -> Expr:
        operands = (bits("int8", value, 4 * lanes) for value in (weights, activations))
        return intrinsic(name, typed("int32", lanes), total, *operands)

    return step


def _sdot(total: Expr, weights: Expr, activations: Expr) -> Expr:
    operands = (bits("int8", value, 16) for value in (weights, activations))
    return intrinsic("llvm.aarch64.neon.sdot", "int32x4", total, *operands)


def smmla(total: Expr, rows: Expr, outputs: Expr) -> Expr:
    """Return the sums of two rows and two outputs, with eight products more in each."""
    return intrinsic("llvm.aarch64.neon.smmla.v4i32.v16i8", "int32x4", total, rows, outputs)


def _pairs(lanes: int) -> Callable[[Expr, Expr, Expr], Expr]:
    """Return sums of two products in 16 bits: unsigned weights, signed activations."""
    name = "llvm.x86.avx512.pmaddubs.w.512" if lanes == 16 else "llvm.x86.avx2.pmadd.ub.sw"

    def step(partial: Expr, weights: Expr, activations: Expr) -> Expr:
        operands = (bits("int8", value, 4 * lanes) for value in (weights, activations))
        pairs = intrinsic(name, typed("int16", 2 * lanes), *operands)
        return pairs if partial is None else partial + pairs

    return step


def _signed_pairs(lanes: int) -> Callable[[Expr, Expr, Expr], Expr]:
    """Return the same for signed weights: their magnitudes times activations of their sign."""
    unsigned = _pairs(lanes)

    def step(partial: Expr, weights: Expr, activations: Expr) -> Expr:
        codes = bits("int8", weights, 4 * lanes)
        size = intrinsic("llvm.abs", typed("int8", 4 * lanes), codes, _false())
        flipped = _with_sign(bits("int8", activations, 4 * lanes), codes, lanes)
        return unsigned(partial, bits("int32", size, lanes), bits("int32", flipped, lanes))

    return step


def _with_sign(activations: Expr, codes: Expr, lanes: int) -> Expr:
    """Return activations, negated where codes are negative."""
    if lanes == 8:
        return intrinsic("llvm.x86.avx2.psign.b", "int8x32", activations, codes)
    zero = T.broadcast(T.int8(0), 4 * lanes)
    return T.Select(codes < zero, zero - activations, activations)


def _false() -> Expr:
    return T.bool(False)


def _widen(lanes: int) -> Callable[[Expr, Expr], Expr]:
    """Return the sums with the pairs of 16 bits added."""
    name = "llvm.x86.avx512.pmaddw.d.512" if lanes == 16 else "llvm.x86.avx2.pmadd.wd"

    def finish(total: Expr, partial: Expr) -> Expr:
        ones = T.broadcast(T.int16(1), 2 * lanes)
        return total + intrinsic(name, typed("int32", lanes), partial, ones)

    return finish


def _multiply(*, signed: bool) -> Callable[[Expr, Expr, Expr], Expr]:
    """Return four products of 32 bits: any processor's vectors have them."""

    def step(total: Expr, weights: Expr, activations: Expr) -> Expr:
        for byte in range(4):
            w = _byte(weights, byte) if signed else (weights >> integer(8 * byte, 4)) & _low()
            total = total + w * _byte(activations, byte)
        return total

    return step


def _byte(value: Expr, byte: int) -> Expr:
    """Return one byte of every lane, its sign extended."""
    return (value << integer(24 - 8 * byte, 4)) >> integer(24, 4)


def _low() -> Expr:
    return splat(integer(255), 4)
