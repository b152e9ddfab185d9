"""The file of weights: each stored once, as its kernel reads it, where an engine can map it.

``weights.bin`` is one array after another, each at a multiple of 64 bytes: a cache line, and the
widest vector. Functions number them in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from llmopt.interface.arrays import Array

ALIGNMENT: Final = 64

Read = Callable[[], Mapping[str, Array]]


@dataclass(frozen=True)
class StoredArray:
    """One array of the file.

    Args:
        name: Name in the source, and of the part.
        dtype: Element type as numpy spells it.
        shape: Sizes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """How long it is."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class _PackedGroup:
    """Arrays that are made together."""

    first: int
    parts: tuple[str, ...]
    read: Read


class WeightFile:
    """The weights that functions asked for, in order, unread until they are written."""

    def __init__(self) -> None:
        self.stored: list[StoredArray] = []
        self._groups: dict[Hashable, _PackedGroup] = {}

    def add(self, key: Hashable, parts: Mapping[str, StoredArray], read: Read) -> dict[str, int]:
        """Return the number of each part of a weight, which is stored only once for one key.

        Args:
            key: Identity of the weight.
            parts: Arrays that will be read, by part.
            read: Returns the arrays of the parts; called once, when they are written.
        """
        group = self._groups.get(key)
        if group is None:
            group = _PackedGroup(len(self.stored), tuple(parts), read)
            self._groups[key] = group
            self.stored.extend(parts.values())
        return {part: group.first + i for i, part in enumerate(group.parts)}

    def write(self, path: Path) -> list[dict[str, Any]]:
        """Write the file and return what is where in it; one weight at a time is in memory."""
        index: list[dict[str, Any]] = []
        with path.open("wb") as file:
            for group in self._groups.values():
                arrays = group.read()
                for number, part in enumerate(group.parts, group.first):
                    start = -(-file.tell() // ALIGNMENT) * ALIGNMENT
                    file.write(bytes(start - file.tell()))
                    file.write(_checked(self.stored[number], arrays[part]))
                    index.append(_entry(self.stored[number], start))
            if not index:
                file.write(bytes(ALIGNMENT))  # an empty file cannot be mapped
        return index


def _entry(stored: StoredArray, start: int) -> dict[str, Any]:
    return {
        "name": stored.name,
        "dtype": stored.dtype,
        "shape": list(stored.shape),
        "offset": start,
    }


def _checked(stored: StoredArray, array: Array) -> memoryview:
    """Return the bytes of an array, which has to be what functions were compiled for."""
    found = (array.dtype.name, array.shape)
    assert found == (stored.dtype, stored.shape), f"{stored}: {found}"
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
