"""What happens to one head of Q or K between projection and attention: norm, rotation, scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels.vectors import across, at, fitting, load, splat, store


@dataclass(frozen=True)
class Turning:
    """How heads are turned.

    Args:
        width: D, numbers in a head.
        rotary: How many of them are rotated, the first ones, half by half; 0 for none.
        norm: Epsilon of the RMS norm before that (Qwen3's and Gemma's QK norm); None for none.
    """

    width: int
    rotary: int = 0
    norm: float | None = None

    @property
    def label(self) -> str:
        """What it does, as part of a name."""
        norm = (
            "" if self.norm is None else f"_norm{self.norm:g}".replace("-", "m").replace(".", "p")
        )
        return f"rotary{self.rotary}{norm}"

    @property
    def reads(self) -> set[str]:
        """Names of the inputs it needs."""
        rotary = {"cos", "sin", "position_ids"} if self.rotary else set()
        return rotary | (set() if self.norm is None else {"q_norm", "k_norm"})


@dataclass(frozen=True)
class Head:
    """One head, before and after.

    Args:
        turning: What to do.
        lanes: Of a vector that divides D and half of the rotated width.
        source: Buffer and place of its first number.
        target: Buffer and place of its first result.
        tables: Cosines and sines, [positions, rotary / 2] each, and the position.
        weight: [D] of the norm.
        scale: What results are multiplied by.
    """

    turning: Turning
    lanes: int
    source: tuple[Any, tuple[Any, ...]]
    target: tuple[Any, tuple[Any, ...]]
    tables: tuple[Any, Any, Any]
    weight: Any
    scale: float

    def square(self, d: Any) -> Any:
        """Return the squares of the numbers from d on."""
        return load(*self.source, d, self.lanes) * load(*self.source, d, self.lanes)

    def number(self, d: Any, root: Any) -> Any:
        """Return the numbers from d on, after the norm."""
        value = load(*self.source, d, self.lanes)
        if self.turning.norm is None:
            return value
        return value * root * load(self.weight, (0,), d, self.lanes)

    def root(self, total: Any) -> Any:
        """Return what the norm multiplies by, given the vector of sums of squares."""
        mean = across(total, lambda a, b: a + b) * splat(1.0 / self.turning.width, self.lanes)
        return splat(1.0, self.lanes) / T.sqrt(mean + splat(self.turning.norm or 0.0, self.lanes))

    def angle(self, table: int, d: Any) -> Any:
        """Return cosines (0) or sines (1) from d on, times the scale."""
        value = load(self.tables[table], (self.tables[2], 0), d, self.lanes)
        return value * splat(self.scale, self.lanes)


def lanes_for(turning: Turning, features: Features) -> int:
    """Return the lanes that divide a head and the half that is rotated."""
    half = turning.rotary // 2
    return fitting(features, turning.width if not half else _divisor(turning.width, half))


def _divisor(first: int, second: int) -> int:
    while second:
        first, second = second, first % second
    return first


@T.inline
def _rotate(head: Any, half: Any, root: Any) -> None:
    """Write the rotated numbers of a head."""
    for j in T.serial(half // head.lanes):
        low: T.let = head.number(j * head.lanes, load(root, (0,), 0, head.lanes))
        high: T.let = head.number(j * head.lanes + half, load(root, (0,), 0, head.lanes))
        cos: T.let = head.angle(0, j * head.lanes)
        sin: T.let = head.angle(1, j * head.lanes)
        store(head.target, j * head.lanes, low * cos - high * sin)
        store(head.target, j * head.lanes + half, high * cos + low * sin)


@T.inline
def turn(head: Any) -> None:
    """Write one head: normed, its first numbers rotated, all scaled."""
    root = T.alloc_buffer((head.lanes,), "float32")
    root[at(0, head.lanes)] = splat(0.0, head.lanes)
    if head.turning.norm is not None:
        for j in T.serial(head.turning.width // head.lanes):
            root[at(0, head.lanes)] = load(root, (0,), 0, head.lanes) + head.square(j * head.lanes)
        root[at(0, head.lanes)] = head.root(load(root, (0,), 0, head.lanes))
    half = T.meta_var(head.turning.rotary // 2)
    if half > 0:
        _rotate(head, half, root)
    for j in T.serial((head.turning.width - 2 * half) // head.lanes):
        store(
            head.target,
            j * head.lanes + 2 * half,
            head.number(j * head.lanes + 2 * half, load(root, (0,), 0, head.lanes))
            * splat(head.scale, head.lanes),
        )
