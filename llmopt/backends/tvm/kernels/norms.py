"""RMS and layer norm of rows.

A row [W] is read from memory once, from the first-level cache after that. Sums run in four vectors
side by side, which hides the latency of the additions, and are folded across lanes once a row.

Roofline: 8·W bytes a row at the bandwidth of memory; a row alone, in decode, is some 100 ns and not
worth a second thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels.activations import LOOPS, Rows
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
        bias: Whether a layer norm adds a bias.
        rows: ``"one"`` for few rows, on one thread; ``"many"`` in parallel.
    """

    kind: Literal["rms", "layer"]
    width: int
    eps: float
    bias: bool = False
    rows: Rows = "many"

    @property
    def label(self) -> str:
        """What it is, as part of a name."""
        flags = ["bias"] * self.bias
        eps = f"eps{self.eps:g}".replace("-", "m").replace(".", "p")
        return "_".join([self.kind, f"w{self.width}", eps, *flags, self.rows])


def norm(wanted: Norm, features: Features) -> Kernel:
    """Return a norm of rows: ``x [M, W]``, ``weight [W]``, maybe ``bias [W]`` to ``y [M, W]``."""
    lanes = fitting(features, wanted.width)
    row, each = ("m", wanted.width), (wanted.width,)
    inputs = [Argument("x", row), Argument("weight", each)]
    inputs += [Argument("bias", each)] * wanted.bias

    def body(buffers: Mapping[str, Any]) -> None:
        with LOOPS[wanted.rows](buffers["x"].ty.shape[0]) as m:
            source = (buffers["x"], (m, 0))
            weights = (buffers["weight"], buffers.get("bias"))
            _normalize(NormRow(wanted, lanes, source, *weights), buffers["y"], (m, 0))

    name = f"norm_{wanted.label}_{features.label}"
    return kernel(name, inputs, [Argument("y", row)], body)


@dataclass(frozen=True)
class NormRow:
    """One row of a norm.

    Args:
        norm: The norm.
        lanes: Lanes of a vector.
        source: Buffer and place of its numbers.
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


def _normalize(row: NormRow, y: Any, index: tuple[Any, Any]) -> None:
    """Write the norm of a row."""
    lanes, width = row.lanes, row.norm.width
    mean = splat(0.0, lanes)
    if row.norm.kind == "layer":
        mean = T.bind(row.mean(_sum(lanes, width, row.number)))
    root = T.bind(row.root(_sum(lanes, width, lambda d: row.square(d, mean))))
    with T.serial(width // lanes) as j:
        store((y, index), j * lanes, row.result(j * lanes, mean, root))
