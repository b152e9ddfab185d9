"""Exponentials and what is made of them, as vectors: no call into libm.

``exp2`` splits x = n + f, |f| <= 1/2: 2**f is a polynomial, 2**n is n added to the exponent bits.
Some 12 instructions for a whole vector, 1e-7 relative.

Each function takes an expression and returns one; what is read more than once is bound by a
statement written before, so they are called where the text of a kernel is being read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.kernels.vectors import lanes_of, splat

_ROUND: Final = 1.5 * 2.0**23
"""Added to a float32 of magnitude below 2**22 it leaves the nearest integer in the low bits."""
_POWERS: Final = tuple(math.log(2.0) ** n / math.factorial(n) for n in range(7))
"""Taylor series of 2**f: the first term left out is 1.2e-7 at f = 1/2."""
_LEAST: Final = -126.0
_MOST: Final = 126.0


def exp2(x: Any) -> Any:
    """Return 2**x for x <= 126: within 3e-7 relative; 0 below -126, so masked scores vanish."""
    lanes = lanes_of(x)
    x = T.bind(x)
    # a call: as an addition, TVM would take the subtraction below for its inverse
    rounded = T.bind(T.fma(x, splat(1.0, lanes), splat(_ROUND, lanes)))
    power = series(T.bind(x - (rounded - splat(_ROUND, lanes))), _POWERS)
    shift = T.shift_left(_bits(rounded, lanes), _splat_int(23, lanes))
    value = T.reinterpret(_bits(power, lanes) + shift, dtype=_dtype("float32", lanes))
    return T.Select(x < splat(_LEAST, lanes), splat(0.0, lanes), value)


def series(x: Any, coefficients: tuple[float, ...]) -> Any:
    """Return ``coefficients[0] + coefficients[1] * x + …``; x is a variable."""
    lanes = lanes_of(x)
    total = splat(coefficients[-1], lanes)
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + splat(coefficient, lanes)
    return total


def _bits(x: Any, lanes: int) -> Any:
    return T.reinterpret(x, dtype=_dtype("int32", lanes))


def _splat_int(number: int, lanes: int) -> Any:
    return T.broadcast(T.int32(number), lanes) if lanes > 1 else T.int32(number)


def _dtype(scalar: str, lanes: int) -> str:
    return f"{scalar}x{lanes}" if lanes > 1 else scalar


def exp(x: Any) -> Any:
    """Return e**x, at most 2**126 and 0 below 2**-126: within 3e-7 + 1e-7 * |x| relative."""
    lanes = lanes_of(x)
    return exp2(T.min(x * splat(math.log2(math.e), lanes), splat(_MOST, lanes)))


def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent, within 2e-7 of it."""
    lanes = lanes_of(x)
    one, zero = splat(1.0, lanes), splat(0.0, lanes)
    x = T.bind(x)
    small = T.bind(exp(splat(-2.0, lanes) * T.max(x, zero - x)))
    positive = T.bind((one - small) / (one + small))
    return T.Select(x < zero, zero - positive, positive)


def softcapped(x: Any, cap: float) -> Any:
    """Return ``cap * tanh(x / cap) * log2(e)``: attention scores as exponents of two."""
    lanes = lanes_of(x)
    return splat(cap * math.log2(math.e), lanes) * tanh(x * splat(1.0 / cap, lanes))


Rows = Literal["one", "many"]
LOOPS: Final[Mapping[Rows, Callable[..., Any]]] = {"one": T.serial, "many": T.parallel}
"""How a kernel goes through its rows: few of them are not worth a second thread."""
