"""RMS and layer norm of rows, with a residual added before; softmax and argmax of rows.

A row [W] is read from memory once, from the first-level cache after that. Sums run in four vectors
side by side, which hides the latency of the additions, and are folded across lanes once a row.

Roofline: 8·W bytes a row (16·W with a residual, which writes the sum too) at the bandwidth of
memory; a row alone, in decode, is some 100 ns and not worth a second thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels.activations import LOOPS, Rows, exp2
from llmopt.backends.tvm.kernels.kernel import Kernel
from llmopt.backends.tvm.kernels.vectors import across, at, fitting, kept, load, splat


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
    inputs = ["x", *["skip"] * wanted.skip, "weight", *["bias"] * wanted.bias]
    outputs = ["y", *["sum"] * wanted.skip]
    names = ("x", "skip", "weight", "bias", "y", "sum")
    whole = _norm(wanted, fitting(features, wanted.width))
    function = kept(whole, names, {*inputs, *outputs})
    name = f"norm_{wanted.label}_{features.label}"
    return Kernel(name, function, tuple(inputs), tuple(outputs))


@dataclass(frozen=True)
class Row:
    """One row of a norm.

    Args:
        norm: The norm.
        lanes: Of a vector.
        source: Buffer and place of its numbers, the residual added already.
        weight: [W].
        bias: [W].
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
        value = self.number(d)
        if self.norm.kind == "layer":
            value = value - mean
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


@T.inline
def sum_row(acc: Any, lanes: Any, width: Any, term: Any) -> None:
    """Write to ``acc [lanes]`` the lane-wise sums of ``term(d)`` over a row."""
    four = T.alloc_buffer((4, lanes), "float32")
    for i in T.unroll(4):
        four[i, at(0, lanes)] = splat(0.0, lanes)
    for j in T.serial(width // (4 * lanes)):
        for i in T.unroll(4):
            four[i, at(0, lanes)] = load(four, (i, 0), 0, lanes) + term((j * 4 + i) * lanes)
    for j in T.serial(width // lanes % 4):
        four[0, at(0, lanes)] = load(four, (0, 0), 0, lanes) + term(
            (width // (4 * lanes) * 4 + j) * lanes
        )
    acc[at(0, lanes)] = (load(four, (0, 0), 0, lanes) + load(four, (1, 0), 0, lanes)) + (
        load(four, (2, 0), 0, lanes) + load(four, (3, 0), 0, lanes)
    )


@T.inline
def _normalize(row: Any, y: Any, place: Any) -> None:
    """Write the norm of a row."""
    mean = T.alloc_buffer((row.lanes,), "float32")
    root = T.alloc_buffer((row.lanes,), "float32")
    mean[at(0, row.lanes)] = splat(0.0, row.lanes)
    if row.norm.kind == "layer":
        sum_row(mean, row.lanes, row.norm.width, row.number)
        mean[at(0, row.lanes)] = row.mean(load(mean, (0,), 0, row.lanes))
    sum_row(
        root,
        row.lanes,
        row.norm.width,
        lambda d: row.square(d, load(mean, (0,), 0, row.lanes)),
    )
    root[at(0, row.lanes)] = row.root(load(root, (0,), 0, row.lanes))
    for j in T.serial(row.norm.width // row.lanes):
        y[place[0], at(place[1] + j * row.lanes, row.lanes)] = row.result(
            j * row.lanes, load(mean, (0,), 0, row.lanes), load(root, (0,), 0, row.lanes)
        )


def _norm(wanted: Norm, lanes: int) -> Any:
    width, heads, loop = wanted.width, wanted.heads, LOOPS[wanted.rows]

    @T.prim_func(s_tir=True)
    def norm(
        x: T.handle,
        skip: T.handle,
        weight: T.handle,
        bias: T.handle,
        y: T.handle,
        sum: T.handle,  # noqa: A002 - the output's name
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        given = T.match_buffer(x, (rows, heads * width), "float32")
        other = T.match_buffer(skip, (rows, heads * width), "float32")
        scale = T.match_buffer(weight, (width,), "float32")
        shift = T.match_buffer(bias, (width,), "float32")
        out = T.match_buffer(y, (rows, heads * width), "float32")
        both = T.match_buffer(sum, (rows, heads * width), "float32")
        for m in loop(rows):
            if wanted.skip:
                for j in T.serial(heads * width // lanes):
                    both[m, at(j * lanes, lanes)] = load(given, (m, j * lanes), 0, lanes) + load(
                        other, (m, j * lanes), 0, lanes
                    )
            for h in T.serial(heads):
                _normalize(
                    Row(
                        wanted,
                        lanes,
                        (both if wanted.skip else given, (m, h * width)),
                        scale,
                        shift,
                    ),
                    out,
                    (m, h * width),
                )

    return norm


def softmax(width: int, features: Features, rows: Rows = "many") -> Kernel:
    """Return the softmax of rows: ``x [M, W]`` to ``y [M, W]``."""
    lanes = fitting(features, width)
    loop, slope = LOOPS[rows], 1.4426950408889634

    @T.prim_func(s_tir=True)
    def softmax(x: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        count = T.int64()
        given = T.match_buffer(x, (count, width), "float32")
        out = T.match_buffer(y, (count, width), "float32")
        for m in loop(count):
            best = T.alloc_buffer((lanes,), "float32")
            total = T.alloc_buffer((lanes,), "float32")
            best[at(0, lanes)] = splat(-3e38, lanes)
            total[at(0, lanes)] = splat(0.0, lanes)
            for j in T.serial(width // lanes):
                best[at(0, lanes)] = T.max(
                    load(best, (0,), 0, lanes), load(given, (m, j * lanes), 0, lanes)
                )
            best[at(0, lanes)] = across(load(best, (0,), 0, lanes), T.max)
            for j in T.serial(width // lanes):
                weight: T.let = exp2(
                    (load(given, (m, j * lanes), 0, lanes) - load(best, (0,), 0, lanes))
                    * splat(slope, lanes)
                )
                out[m, at(j * lanes, lanes)] = weight
                total[at(0, lanes)] = load(total, (0,), 0, lanes) + weight
            total[at(0, lanes)] = splat(1.0, lanes) / across(
                load(total, (0,), 0, lanes), lambda a, b: a + b
            )
            for j in T.serial(width // lanes):
                out[m, at(j * lanes, lanes)] = load(out, (m, j * lanes), 0, lanes) * load(
                    total, (0,), 0, lanes
                )

    return Kernel(f"softmax_w{width}_{rows}_{features.label}", softmax, ("x",), ("y",))


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
            best = T.alloc_buffer((lanes,), "float32")
            where = T.alloc_buffer((1,), "int64")
            best[at(0, lanes)] = splat(float("-inf"), lanes)
            for j in T.serial(width // lanes):
                best[at(0, lanes)] = T.max(
                    load(best, (0,), 0, lanes), load(given, (m, j * lanes), 0, lanes)
                )
            best[at(0, lanes)] = across(load(best, (0,), 0, lanes), T.max)
            where[0] = T.int64(0)
            while given[m, where[0]] < best[0]:
                where[0] = where[0] + T.int64(1)
            out[m] = where[0]

    return Kernel(f"argmax_w{width}_{features.label}", argmax, ("x",), ("y",))
