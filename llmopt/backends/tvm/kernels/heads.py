"""What happens to one head of Q or K between projection and attention: norm, rotation, scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels.vectors import (
    Registers,
    across,
    fitting,
    load,
    splat,
    store,
)


@dataclass(frozen=True)
class Rotation:
    """Norm, rotation and scale of heads.

    Args:
        width: D, numbers in a head.
        rotary: Number of leading elements that are rotated, half by half; 0 for none.
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
        rotation: Norm, rotation and scale to apply.
        lanes: Lanes of a vector that divides D and half of the rotated width.
        source: Buffer and place of its first number.
        target: Buffer and place of its first result.
        tables: Cosines and sines, [positions, rotary / 2] each, and the position.
        weight: [D] of the norm.
        scale: Factor of the results.
    """

    rotation: Rotation
    lanes: int
    source: tuple[Any, tuple[Any, ...]]
    target: tuple[Any, tuple[Any, ...]]
    tables: tuple[Any, Any, Any]
    weight: Any
    scale: float

    def number(self, d: Any, root: Any) -> Any:
        """Return the numbers from d on, after the norm."""
        value = load(*self.source, d, self.lanes)
        if root is None:
            return value
        return value * root * load(self.weight, (0,), d, self.lanes)

    def angle(self, table: int, d: Any) -> Any:
        """Return cosines (0) or sines (1) from d on, times the scale."""
        value = load(self.tables[table], (self.tables[2], 0), d, self.lanes)
        return value * splat(self.scale, self.lanes)


def lanes_for(rotation: Rotation, features: Features) -> int:
    """Return the lanes that divide a head and the half that is rotated."""
    half = rotation.rotary // 2
    return fitting(features, rotation.width if not half else _divisor(rotation.width, half))


def _divisor(first: int, second: int) -> int:
    while second:
        first, second = second, first % second
    return first


def rotate(head: Head) -> None:
    """Write one head: normed, its first numbers rotated, all scaled."""
    root = _root(head) if head.rotation.norm is not None else None
    half = head.rotation.rotary // 2
    if half:
        _rotate(head, half, root)
    with T.serial((head.rotation.width - 2 * half) // head.lanes) as j:
        value = head.number(j * head.lanes + 2 * half, root)
        store(head.target, j * head.lanes + 2 * half, value * splat(head.scale, head.lanes))


def _root(head: Head) -> Any:
    """Return what the norm of a head multiplies by, in every lane."""
    total = Registers.allocated(1, 1, head.lanes)
    total.clear()
    with T.serial(head.rotation.width // head.lanes) as j:
        value = T.bind(load(*head.source, j * head.lanes, head.lanes))
        total.put(0, 0, total.get(0, 0) + value * value)
    mean = across(total.get(0, 0), lambda a, b: a + b) * splat(1 / head.rotation.width, head.lanes)
    total.put(0, 0, splat(1.0, head.lanes) / T.sqrt(mean + splat(head.rotation.norm, head.lanes)))
    return total.get(0, 0)


def _rotate(head: Head, half: int, root: Any) -> None:
    """Write the rotated numbers of a head."""
    with T.serial(half // head.lanes) as j:
        low = T.bind(head.number(j * head.lanes, root))
        high = T.bind(head.number(j * head.lanes + half, root))
        cos = T.bind(head.angle(0, j * head.lanes))
        sin = T.bind(head.angle(1, j * head.lanes))
        store(head.target, j * head.lanes, low * cos - high * sin)
        store(head.target, j * head.lanes + half, high * cos + low * sin)
