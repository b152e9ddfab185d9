"""Large pages: what a block allocates lies on them afterwards, and holds what it held."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from llmopt.interface.arrays import Array
from llmopt.runtime import huge_pages as pages
from llmopt.runtime.session import zeros_together

MIB = 1 << 20
needs_large_pages = pytest.mark.skipif(
    not pages.available(), reason="needs transparent huge pages (Linux, enabled or madvise)"
)


def huge_bytes(array: Array) -> int:
    """Return how much of the memory map that holds ``array`` lies on large pages."""
    address = array.ctypes.data
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


def small_pages(size: int) -> Array:
    """Return memory that came in small pages: touched before anybody asked for large ones."""
    import mmap

    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    array[:] = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    return array


@needs_large_pages
def test_memory_of_the_block_moves_to_large_pages_and_keeps_its_content() -> None:
    with pages.large_pages():
        array = small_pages(16 * MIB)
        before = huge_bytes(array)
        wanted = array.copy()
    if not huge_bytes(array):
        pytest.skip("needs Linux 6.1: this kernel does not collapse pages when asked")

    assert before == 0
    assert huge_bytes(array) >= 8 * MIB
    assert np.array_equal(array, wanted)


@needs_large_pages
def test_memory_from_before_the_block_is_left_as_it_is() -> None:
    array = small_pages(16 * MIB)
    with pages.large_pages():
        pass

    assert huge_bytes(array) == 0


@pytest.mark.parametrize("policy", ["always madvise [never]\n", None])
def test_nothing_is_asked_for_where_it_is_forbidden_or_unknown(
    policy: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "enabled"
    if policy is not None:
        path.write_text(policy)
    monkeypatch.setattr(pages, "POLICY", path)
    monkeypatch.setattr(pages, "MAPS", tmp_path / "not read")

    with pages.large_pages():
        pass

    assert not pages.available()


@pytest.mark.parametrize(
    ("spans", "others", "left"),
    [
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 10)], [(2, 4), (6, 7)], [(0, 2), (4, 6), (7, 10)]),
        ([(0, 4), (6, 9)], [(3, 7)], [(0, 3), (7, 9)]),
        ([(5, 9)], [(0, 5), (9, 12)], [(5, 9)]),
    ],
)
def test_what_was_there_before_is_taken_out(
    spans: list[pages.Span], others: list[pages.Span], left: list[pages.Span]
) -> None:
    assert pages._without(spans, others) == left


def test_arrays_cut_from_one_piece_do_not_overlap() -> None:
    arrays = zeros_together([(3, 5), (2,), (4, 4)], ["float32", "float16", "float32"])
    for number, array in enumerate(arrays):
        array[...] = number + 1

    assert [array.dtype for array in arrays] == [np.float32, np.float16, np.float32]
    assert [array.shape for array in arrays] == [(3, 5), (2,), (4, 4)]
    assert all(array.ctypes.data % 64 == 0 for array in arrays)
    assert all(np.all(array == number + 1) for number, array in enumerate(arrays))
    assert zeros_together([], []) == []
