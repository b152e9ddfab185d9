"""RMS and layer norm of rows, with a residual added before; softmax and argmax of rows.

A row [W] is read from memory once, from the first-level cache after that. Sums run in four vectors
side by side, which hides the latency of the additions, and are folded across lanes once a row.

Roofline: 8·W bytes a row (16·W with a residual, which writes the sum too) at the bandwidth of
memory; a row alone, in decode, is some 100 ns and not worth a second thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels.activations import LOOPS, Rows, exp2
from llmopt.backends.tvm.kernels.kernel import Kernel
from llmopt.backends.tvm.kernels.signature import Argument, kernel
from llmopt.backends.tvm.kernels.vectors import (
    Registers,
    across,
    fitting,
    load,
    splat,
    store,
)


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis.

    Args:
        kind: ``"rms"`` or ``"layer"``.
        width: W, numbers in a row.
        eps: Added to the mean of squares.
        skip: Whether a residual is added first; the sum then is a second output.
        bias: Whether a layer norm adds a bias.
        heads: How many norms lie side by side in a row [heads · W], with one weight [W].
        rows: ``"one"`` for few rows, on one thread; ``"many"`` in parallel.
    """

    kind: Literal["rms", "layer"]
    width: int
    eps: float
    skip: bool = False
    bias: bool = False
    heads: int = 1
    rows: Rows = "many"

    @property
    def label(self) -> str:
        """What it is, as part of a name."""
        flags = [flag for flag in ("skip", "bias") if getattr(self, flag)]
        eps = f"eps{self.eps:g}".replace("-", "m").replace(".", "p")
        return "_".join([self.kind, f"w{self.width}", f"h{self.heads}", eps, *flags, self.rows])


def norm(wanted: Norm, features: Features) -> Kernel:
    """Return a norm of rows.

    Inputs are ``x [M, heads·W]``, ``skip`` of the same shape if there is one, ``weight [W]`` and
    ``bias [W]`` if there is one; outputs ``y`` and, with a residual, ``sum = x + skip``.
    """
    lanes = fitting(features, wanted.width)
    row, each = ("m", wanted.heads * wanted.width), (wanted.width,)
    inputs = [Argument("x", row), *[Argument("skip", row)] * wanted.skip]
    inputs += [Argument("weight", each), *[Argument("bias", each)] * wanted.bias]
    outputs = [Argument("y", row), *[Argument("sum", row)] * wanted.skip]

    def body(buffers: Mapping[str, Any]) -> None:
        with LOOPS[wanted.rows](buffers["x"].ty.shape[0]) as m:
            source = _added(wanted, buffers, m, lanes) if wanted.skip else buffers["x"]
            with T.serial(wanted.heads) as h:
                place = (m, h * wanted.width)
                weights = (buffers["weight"], buffers.get("bias"))
                _normalize(Row(wanted, lanes, (source, place), *weights), buffers["y"], place)

    return kernel(f"norm_{wanted.label}_{features.label}", inputs, outputs, body)


def _added(wanted: Norm, buffers: Mapping[str, Any], m: Any, lanes: int) -> Any:
    """Write row m with its residual added, and return the buffer of sums."""
    with T.serial(wanted.heads * wanted.width // lanes) as j:
        first, second = (load(buffers[name], (m, 0), j * lanes, lanes) for name in ("x", "skip"))
        store((buffers["sum"], (m, 0)), j * lanes, first + second)
    return buffers["sum"]


@dataclass(frozen=True)
class Row:
    """One row of a norm.

    Args:
        norm: The norm.
        lanes: Of a vector.
        source: Buffer and place of its numbers, the residual added already.
        weight: [W].
        bias: [W]; None where there is none.
    """

    norm: Norm
    lanes: int
    source: tuple[Any, tuple[Any, ...]]
    weight: Any
    bias: Any

    def number(self, d: Any) -> Any:
        """Return the numbers from d on."""
        return load(*self.source, d, self.lanes)

    def square(self, d: Any, mean: Any) -> Any:
        """Return the squares of the numbers from d on, less the mean."""
        value = T.bind(self.number(d) - mean if self.norm.kind == "layer" else self.number(d))
        return value * value

    def mean(self, total: Any) -> Any:
        """Return the mean in every lane, given the sums in each."""
        whole = across(total, lambda a, b: a + b)
        return whole * splat(1.0 / self.norm.width, self.lanes)

    def root(self, squares: Any) -> Any:
        """Return 1 / √(mean of squares + eps), given their sums in each lane."""
        mean = self.mean(squares) + splat(self.norm.eps, self.lanes)
        return splat(1.0, self.lanes) / T.sqrt(mean)

    def result(self, d: Any, mean: Any, root: Any) -> Any:
        """Return what the norm makes of the numbers from d on."""
        value = self.number(d)
        if self.norm.kind == "layer":
            value = value - mean
        value = value * root * load(self.weight, (0,), d, self.lanes)
        return value + load(self.bias, (0,), d, self.lanes) if self.norm.bias else value


def _sum(lanes: int, width: int, term: Callable[[Any], Any]) -> Any:
    """Return the lane-wise sums of ``term(d)`` over a row, in four vectors side by side."""
    four = Registers.allocated(4, 1, lanes)
    four.clear()
    whole = width // (4 * lanes)
    with T.serial(whole) as j:
        for i in range(4):
            four.put(i, 0, four.get(i, 0) + term((j * 4 + i) * lanes))
    for i in range(width // lanes % 4):
        four.put(i, 0, four.get(i, 0) + term((whole * 4 + i) * lanes))
    return (four.get(0, 0) + four.get(1, 0)) + (four.get(2, 0) + four.get(3, 0))


def _normalize(row: Row, y: Any, place: tuple[Any, Any]) -> None:
    """Write the norm of a row."""
    lanes, width = row.lanes, row.norm.width
    mean = splat(0.0, lanes)
    if row.norm.kind == "layer":
        mean = T.bind(row.mean(_sum(lanes, width, row.number)))
    root = T.bind(row.root(_sum(lanes, width, lambda d: row.square(d, mean))))
    with T.serial(width // lanes) as j:
        store((y, place), j * lanes, row.result(j * lanes, mean, root))


def softmax(width: int, features: Features, rows: Rows = "many") -> Kernel:
    """Return the softmax of rows: ``x [M, W]`` to ``y [M, W]``."""
    lanes = fitting(features, width)
    loop = LOOPS[rows]

    @T.prim_func(s_tir=True)
    def softmax(x: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        count = T.int64()
        given = T.match_buffer(x, (count, width), "float32")
        out = T.match_buffer(y, (count, width), "float32")
        for m in loop(count):
            _soften(given, out, m, lanes)

    return Kernel(f"softmax_w{width}_{rows}_{features.label}", softmax, ("x",), ("y",))


def _soften(given: Any, out: Any, m: Any, lanes: int) -> None:
    """Write the softmax of row m."""
    vectors, total = int(given.ty.shape[1]) // lanes, Registers.allocated(1, 1, lanes)
    best = T.bind(_largest(given, m, lanes))
    total.clear()
    with T.serial(vectors) as j:
        score = load(given, (m, 0), j * lanes, lanes) - best
        weight = T.bind(exp2(score * splat(math.log2(math.e), lanes)))
        store((out, (m, 0)), j * lanes, weight)
        total.put(0, 0, total.get(0, 0) + weight)
    part = T.bind(splat(1.0, lanes) / across(total.get(0, 0), lambda a, b: a + b))
    with T.serial(vectors) as j:
        store((out, (m, 0)), j * lanes, load(out, (m, 0), j * lanes, lanes) * part)


def _largest(given: Any, m: Any, lanes: int) -> Any:
    """Return the largest number of row m, in every lane."""
    best = Registers.allocated(1, 1, lanes)
    best.put(0, 0, splat(float("-inf"), lanes))
    with T.serial(int(given.ty.shape[1]) // lanes) as j:
        best.put(0, 0, T.max(best.get(0, 0), load(given, (m, 0), j * lanes, lanes)))
    best.put(0, 0, across(best.get(0, 0), T.max))
    return best.get(0, 0)


def _first_of_largest(given: Any, out: Any, m: Any, lanes: int) -> None:
    """Write where the largest number of row m comes first."""
    best = T.alloc_buffer((lanes,), "float32")
    store((best, (0,)), 0, _largest(given, m, lanes))
    where = T.alloc_buffer((1,), "int64")
    T.buffer_store(where, T.int64(0), [0])
    with T.While(given[m, where[0]] < best[0]):
        T.buffer_store(where, where[0] + T.int64(1), [0])
    T.buffer_store(out, where[0], [m])


def argmax(width: int, features: Features) -> Kernel:
    """Return the index of the first largest number of rows: ``x [M, W]`` to ``y [M] int64``."""
    lanes = fitting(features, width)

    @T.prim_func(s_tir=True)
    def argmax(x: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        count = T.int64()
        given = T.match_buffer(x, (count, width), "float32")
        out = T.match_buffer(y, (count,), "int64")
        for m in T.serial(count):
            _first_of_largest(given, out, m, lanes)

    return Kernel(f"argmax_w{width}_{features.label}", argmax, ("x",), ("y",))
