"""Large pages for weights: every decoded token reads them all, and small pages cost lookups.

Linux gives a process 4 KiB pages unless it asks for more; where it may ask (``madvise``), a
decoder step of quantized weights gets some 10 % faster (``bench/README.md``). Only memory that a
block of code obtained is asked for, so that what the process held before is left as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

MAPS: Final = Path("/proc/self/maps")
POLICY: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SIZE: Final = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MADV_HUGEPAGE: Final = 14
_MADV_COLLAPSE: Final = 25
"""Since Linux 6.1; an older kernel refuses it, and collapses pages on its own time."""

Span = tuple[int, int]


@contextlib.contextmanager
def large_pages() -> Iterator[None]:
    """Move what the block allocates, and still holds at its end, onto large pages.

    It is a request: where the system has no such pages, or forbids them, nothing happens.
    """
    size = _page_size()
    before = _private_memory() if size else []
    yield
    if size:
        gained = _without(_private_memory(), before)
        _collapse([span for span in (_aligned(one, size) for one in gained) if span[0] < span[1]])


def available() -> bool:
    """Tell whether this system gives large pages to a process that asks."""
    return _page_size() > 0


def _page_size() -> int:
    """Return bytes of a large page, or 0 where there are none to be had."""
    if not sys.platform.startswith("linux"):
        return 0
    try:
        return 0 if "[never]" in POLICY.read_text() else int(SIZE.read_text())
    except OSError:  # a kernel without them, or a sandbox that does not say
        return 0


def _private_memory() -> list[Span]:
    """Return the writable memory of this process that belongs to no file, in ascending order."""
    spans = []
    for line in MAPS.read_text().splitlines():
        ends, rights, _, _, inode, *name = line.split(maxsplit=5)
        stack = bool(name) and name[0].startswith("[stack")
        if rights == "rw-p" and inode == "0" and not stack:
            start, end = (int(address, 16) for address in ends.split("-"))
            spans.append((start, end))
    return spans


def _without(spans: list[Span], others: list[Span]) -> list[Span]:
    """Return the parts of ``spans`` that no span of ``others`` covers."""
    left = spans
    for low, high in others:
        sides = [((start, min(end, low)), (max(start, high), end)) for start, end in left]
        left = [side for pair in sides for side in pair if side[0] < side[1]]
    return left


def _aligned(span: Span, size: int) -> Span:
    return -(-span[0] // size) * size, span[1] // size * size


def _collapse(spans: list[Span]) -> None:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, end in spans:
        madvise(start, end - start, _MADV_HUGEPAGE)
        madvise(start, end - start, _MADV_COLLAPSE)
