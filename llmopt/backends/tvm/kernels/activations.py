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

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels.kernel import Kernel
from llmopt.backends.tvm.kernels.vectors import fitting, lanes_of, load, splat, store

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


def silu(x: Any) -> Any:
    """Return x / (1 + e**-x)."""
    lanes = lanes_of(x)
    x = T.bind(x)
    return x / (splat(1.0, lanes) + exp(splat(0.0, lanes) - x))


def gelu_tanh(x: Any) -> Any:
    """Return GELU by its approximation with tanh: x / (1 + e**-2u), u = √(2/π) (x + 0.044715 x³).

    Source: Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415, section 2.
    """
    lanes = lanes_of(x)
    one, slope = splat(1.0, lanes), splat(-2.0 * math.sqrt(2.0 / math.pi), lanes)
    x = T.bind(x)
    return x / (one + exp(slope * x * (one + splat(0.044715, lanes) * x * x)))


_TAIL: Final = tuple(
    0.5 * a for a in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
)
_TAIL_SLOPE: Final = 0.3275911 / math.sqrt(2.0)


def gelu(x: Any) -> Any:
    """Return x Φ(x), within 2e-7 * |x| of it.

    Φ(-|x|) = t (a1 + a2 t + … + a5 t⁴) e**(-x²/2) / 2 with t = 1 / (1 + p |x| / √2).

    Source: Abramowitz and Stegun 1964, Handbook of Mathematical Functions, 7.1.26.
    """
    lanes = lanes_of(x)
    one, zero = splat(1.0, lanes), splat(0.0, lanes)
    x = T.bind(x)
    t = T.bind(one / (one + splat(_TAIL_SLOPE, lanes) * T.max(x, zero - x)))
    density = exp(splat(-0.5, lanes) * x * x)
    low = T.bind(x * t * series(t, _TAIL) * density)
    return T.Select(x < zero, low, x - low)


def softcapped(x: Any, cap: float) -> Any:
    """Return ``cap * tanh(x / cap) * log2(e)``: attention scores as exponents of two."""
    lanes = lanes_of(x)
    return splat(cap * math.log2(math.e), lanes) * tanh(x * splat(1.0 / cap, lanes))


Rows = Literal["one", "many"]
LOOPS: Final[Mapping[Rows, Callable[..., Any]]] = {"one": T.serial, "many": T.parallel}
"""How a kernel goes through its rows: few of them are not worth a second thread."""
FUNCTIONS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "exp": exp,
    "tanh": tanh,
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}


def activation(name: str, width: int, features: Features, rows: Rows = "many") -> Kernel:
    """Return a function of every number: ``x [M, W]`` to ``y [M, W]``.

    Args:
        name: Of `FUNCTIONS`.
        width: W.
        features: Of the processor.
        rows: ``"one"`` for few rows, on one thread; ``"many"`` in parallel.
    """
    lanes, loop, function = fitting(features, width), LOOPS[rows], FUNCTIONS[name]

    @T.prim_func(s_tir=True)
    def activation(x: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        count = T.int64()
        given = T.match_buffer(x, (count, width), "float32")
        out = T.match_buffer(y, (count, width), "float32")
        for m in loop(count):
            for j in T.serial(width // lanes):
                store((out, (m, 0)), j * lanes, function(load(given, (m, 0), j * lanes, lanes)))

    return Kernel(f"{name}_w{width}_{rows}_{features.label}", activation, ("x",), ("y",))


def gated(name: str, width: int, features: Features, rows: Rows = "many") -> Kernel:
    """Return ``f(gate) * up``: ``x [M, 2·W]``, gates first, to ``y [M, W]``.

    The arguments are those of `activation`; ``"silu"`` makes SwiGLU, ``"gelu_tanh"`` GeGLU.
    """
    lanes, loop, function = fitting(features, width), LOOPS[rows], FUNCTIONS[name]

    @T.prim_func(s_tir=True)
    def gated(x: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        count = T.int64()
        given = T.match_buffer(x, (count, 2 * width), "float32")
        out = T.match_buffer(y, (count, width), "float32")
        for m in loop(count):
            for j in T.serial(width // lanes):
                store(
                    (out, (m, 0)),
                    j * lanes,
                    function(load(given, (m, 0), j * lanes, lanes))
                    * load(given, (m, width), j * lanes, lanes),
                )

    return Kernel(f"gated_{name}_w{width}_{rows}_{features.label}", gated, ("x",), ("y",))
