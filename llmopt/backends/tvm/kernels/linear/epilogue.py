"""What is done to a product before it is stored: bias, activation, gate, residual.

Exponentials and the error function are polynomials that vectorize, since LLVM calls libm once
for every element. Their errors: `exponential` 2e-7 relative; `gelu` 1.2e-6 and `gelu_tanh` 5e-7
absolute for |x| <= 8; `swish` 3e-7 relative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from llmopt.backends.tvm.kernels.linear.storage import HALF, TILE
from llmopt.backends.tvm.kernels.script import (
    Expr,
    T,
    bind,
    bits,
    cast,
    integer,
    intrinsic,
    load,
    number,
    prefetch,
    serial,
    store,
    typed,
    when,
)

_WIDE: Final = 16  # lanes that only AVX-512 has
_LOG2_E: Final = 1.4426950408889634
_LN2_HIGH: Final = 0.693359375  # 9 bits, so that its product with an exponent is exact
_LN2_LOW: Final = -2.12194440054690583e-4
_TAYLOR: Final = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
_PHI_ABOVE: Final = (
    *(2.35569831e-08, 6.36395065e-06, 0.00016323607),
    *(0.00464457173, 0.0332545432, 0.398942248),
)
_PHI_BELOW: Final = (
    *(1.22180894e-06, 7.21090468e-05, 0.00185286525),
    *(0.0283137166, 0.250022906, 1.0),
)
_PHI_END: Final = 5.37
"""Phi(x) = 1/2 + x * above(x**2) / below(x**2) for |x| <= 5.37: within 5e-9, where Phi(-x) is 4e-8.
Fitted by iterated least squares, weights raised where the error was largest (Lawson 1961)."""


def polynomial(coefficients: Sequence[float], x: Expr, lanes: int) -> Expr:
    """Return a polynomial of ``x``, highest power first."""
    value = number(coefficients[0], lanes)
    for coefficient in coefficients[1:]:
        value = value * x + number(coefficient, lanes)
    return value


def exponential(x: Expr, lanes: int) -> Expr:
    """Return e**x for x in -87 … 88; beyond that, what it is at the ends.

    e**x = 2**n * e**r with n = round(x / ln 2) and |r| <= ln 2 / 2, where a Taylor polynomial of
    degree 7 is within 6e-9.
    """
    x = bind(T.max(T.min(x, number(88, lanes)), number(-87, lanes)))
    n = bind(intrinsic("llvm.rint", typed("float32", lanes), x * number(_LOG2_E, lanes)))
    r = bind(x - n * number(_LN2_HIGH, lanes) - n * number(_LN2_LOW, lanes))
    power = (cast("int32", n, lanes) + integer(127, lanes)) << integer(23, lanes)
    return polynomial(_TAYLOR, r, lanes) * bits("float32", power, lanes)


def reciprocal(x: Expr, lanes: int) -> Expr:
    """Return 1 / x, within 1e-7 relative.

    A division of 512 bits takes as long as ten multiplications; an approximation of 14 bits and
    one step of Newton's take four.
    """
    if lanes != _WIDE:
        return number(1, lanes) / x
    x = bind(x)
    operands = (x, number(0, lanes), T.int16(-1))
    near = bind(intrinsic("llvm.x86.avx512.rcp14.ps.512", typed("float32", lanes), *operands))
    return near * (number(2, lanes) - x * near)


def swish(x: Expr, lanes: int) -> Expr:
    """Return x * sigmoid(x)."""
    return x * reciprocal(number(1, lanes) + exponential(number(0, lanes) - x, lanes), lanes)


def gelu_tanh(x: Expr, lanes: int) -> Expr:
    """Return Gelu by its approximation with tanh: x * sigmoid(2 u)."""
    inner = x * (number(1, lanes) + x * x * number(0.044715, lanes))
    twice = inner * number(-1.5957691216057308, lanes)  # -2 * sqrt(2 / pi)
    return x * reciprocal(number(1, lanes) + exponential(twice, lanes), lanes)


def gelu(x: Expr, lanes: int) -> Expr:
    """Return x * Phi(x), Phi the distribution of standard normal numbers; 0 below -5.37."""
    end = number(_PHI_END, lanes)
    near = bind(T.max(T.min(x, end), number(-_PHI_END, lanes)))
    square = bind(near * near)
    below = reciprocal(polynomial(_PHI_BELOW, square, lanes), lanes)
    odd = bind(near * polynomial(_PHI_ABOVE, square, lanes))
    phi = odd * below + number(0.5, lanes)
    return T.Select(x < number(-_PHI_END, lanes), number(0, lanes), x * phi)


_ACTIVATIONS: Final = {"gelu": gelu, "gelu_tanh": gelu_tanh}


@dataclass(frozen=True)
class Epilogue:
    """What follows a product [M, N].

    Args:
        n: Rows of the weight, gate and up together.
        steps: Steps among ``bias``, ``gelu``, ``gelu_tanh``, ``swiglu``, ``residual``, in their
            order.
        buffers: The kernel's buffers by name.
    """

    n: int
    steps: tuple[str, ...]
    buffers: Any

    @property
    def paired(self) -> bool:
        """Whether a tile holds gates and what they multiply."""
        return "swiglu" in self.steps

    @property
    def columns(self) -> int:
        """How many columns the result has."""
        return self.n // 2 if self.paired else self.n

    def fetch(self, row: Expr, tile: Expr) -> None:
        """Ask for the lines of one row of a tile before it is stored; each row lies in a page."""
        wide = HALF if self.paired else TILE
        last = -(-self.columns // HALF) * HALF - HALF
        for at in range(0, wide, HALF):
            column = T.min(tile * wide + at, T.int64(last))
            prefetch(self.buffers["y"], (row, column), write=True)

    def write(self, row: Expr, tile: Expr, vectors: Sequence[Expr]) -> None:
        """Store one row of a tile, whose 32 outputs are ``vectors``."""
        middle = len(vectors) // 2
        low, high = vectors[:middle], vectors[middle:]
        if self.paired:
            self._write_half(row, tile * HALF, list(zip(low, high, strict=True)))
            return
        self._write_half(row, tile * TILE, [(vector,) for vector in low])
        self._write_half(row, tile * TILE + HALF, [(vector,) for vector in high])

    def _write_half(self, row: Expr, start: Expr, vectors: Sequence[tuple[Expr, ...]]) -> None:
        lanes = HALF // len(vectors)
        spare = self.columns % HALF
        whole = self.columns - spare
        with when(start < whole):
            for index, values in enumerate(vectors):
                self._store(row, start + index * lanes, values, lanes)
        if spare:
            with when(start == whole):
                self._write_spare(row, start, vectors)

    def _write_spare(self, row: Expr, start: Expr, vectors: Sequence[tuple[Expr, ...]]) -> None:
        """Store the last columns one by one."""
        lanes = HALF // len(vectors)
        parts = [T.alloc_buffer((HALF,), "float32") for _ in vectors[0]]
        for index, values in enumerate(vectors):
            for part, value in zip(parts, values, strict=True):
                store(part, [index * lanes], value, lanes)
        with serial(self.columns % HALF) as lane:
            self._store(row, start + lane, tuple(load(part, [lane], 1) for part in parts), 1)

    def _store(self, row: Expr, column: Expr, values: tuple[Expr, ...], lanes: int) -> None:
        result = bind(self._finish(column, values, lanes))
        if "residual" in self.steps:
            result = result + load(self.buffers["residual"], [row, column], lanes)
        store(self.buffers["y"], [row, column], result, lanes)

    def _finish(self, column: Expr, values: tuple[Expr, ...], lanes: int) -> Expr:
        if "bias" in self.steps:
            offsets = (0, self.n // 2)
            bias = self.buffers["bias"]
            values = tuple(
                value + load(bias, [column + offset], lanes)
                for value, offset in zip(values, offsets, strict=False)
            )
        values = tuple(bind(value) for value in values)
        if self.paired:
            return swish(values[0], lanes) * values[1]
        for step in self.steps:
            if step in _ACTIVATIONS:
                return _ACTIVATIONS[step](values[0], lanes)
        return values[0]
