"""Some columns of a tile of weights as signed bytes, as AMX's tiles take them.

A panel is [columns / 64, 2 halves, 16 quads, 16 outputs] int32: tiles of 64 columns and 16 outputs,
1 KB each, a lane four columns of one output.

**Weights of 4 bits get one scale a row on the way**, so that sums of a whole panel share it::

    byte = round((code - zero) * ratio)    ratio = scale of the block * 15 / largest of the row
                                           result = sums * largest of the row / 15

(8 instead of 15 where blocks have zero points: either way a byte is at most 120.) A block whose
scale is the row's largest is exact; in others a code is off by half of 1/15 of the largest scale,
at most, where 4 bits are off by half of their own scale. It is done in 16 bits, two vectors for the
even and two for the odd columns of eight::

    code << 4  -  zero << 4   multiplied by ratio * 2**11, highest 16 bits, rounded (vpmulhrsw)

which is 19 operations for 128 codes. Weights of 6 and 8 bits keep their codes and scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from llmopt.backends.tvm.kernels.amx import HIGH
from llmopt.backends.tvm.kernels.linear.codes import four_codes
from llmopt.backends.tvm.kernels.linear.storage import HALF, TILE, Storage
from llmopt.backends.tvm.kernels.script import (
    Expr,
    Register,
    T,
    bind,
    bits,
    cast,
    integer,
    intrinsic,
    load,
    number,
    prefetch,
    serial,
    splat,
    store,
    typed,
)

LANES: Final = 16
DEEP: Final = 64
"""Columns in a tile."""
FETCHING: Final = 4
"""Times 32 rows while which the next panel is asked for."""
_LINE: Final = 64  # bytes
_MOST: Final = 10  # tiles of 64 columns in a panel: two thirds of the first cache
_FINE: Final = 11  # bits of a ratio behind the point


@dataclass(frozen=True)
class PanelSizes:
    """Sizes of panels.

    Args:
        storage: Layout of the weight.
        high: Tiles of 64 columns in a panel; the last may have fewer.
        count: Number of panels in a row.
    """

    storage: Storage
    high: int
    count: int

    @classmethod
    def of(cls, storage: Storage) -> PanelSizes:
        """Return panels as even as can be."""
        tiles = -(-storage.columns // DEEP)
        least = -(-tiles // _MOST)
        count = next((n for n in range(least, 2 * least + 1) if tiles % n == 0), least)
        high = -(-tiles // count)
        step = -(-storage.block // DEEP)
        if not storage.channels:
            high = -(-high // step) * step
        return cls(storage, high, -(-tiles // high))

    @property
    def columns(self) -> int:
        """Columns in a panel."""
        return self.high * DEEP

    @property
    def rescaled(self) -> bool:
        """Whether weights get one scale a row."""
        return self.storage.bits == 4

    @property
    def kept(self) -> bool:
        """Whether sums stay in their tiles for a whole panel."""
        return self.rescaled or self.storage.channels

    @property
    def depth(self) -> int:
        """Columns that are multiplied at once."""
        return DEEP if self.kept else min(DEEP, self.storage.block)

    @property
    def group(self) -> int:
        """Columns of activations that share a scale."""
        if self.storage.channels:
            return self.storage.columns
        return self.columns if self.rescaled else self.storage.block * self.storage.shared

    def there(self, panel: Expr) -> Expr:
        """Return how many columns a panel has."""
        whole = self.count * self.columns == self.storage.columns
        if whole or isinstance(panel, int):
            last = self.storage.columns - (self.count - 1) * self.columns
            return self.columns if whole or panel < self.count - 1 else last
        return self.columns  # the last one is written apart


class Panel:
    """The weights of one tile, a panel at a time.

    Args:
        form: Sizes.
        buffers: ``codes``, ``scale`` and, with zero points, ``zero_point``.
        tile: Index of the tile.
    """

    def __init__(self, form: PanelSizes, buffers: Mapping[str, Any], tile: Expr) -> None:
        self.form = form
        self.buffers = buffers
        self.tile = tile
        self.bytes = T.alloc_buffer((form.high * 2 * HIGH, HIGH), "int32")
        self.ends = self._ends()
        """What 16 outputs are multiplied with at the end, twice; None where nothing is left to."""
        self._inverse = [None, None] if self.ends[0] is None else self._inverses()

    def scales(self, block: Expr) -> list[Expr | None]:
        """Return the scales of a block, 16 outputs twice; None where they come at the end."""
        return [None if self.form.kept else bind(self._scale(block, at)) for at in (0, HALF)]

    def address(self, column: Expr) -> tuple[Expr, Expr]:
        """Return where the tile of 16 outputs lies that begins with a column of the panel."""
        quad = T.floordiv(column, 4) if not isinstance(column, int) else column // 4
        return T.floordiv(quad, HIGH) * 2 * HIGH + T.floormod(quad, HIGH), 0

    def unpack(self, panel: Expr) -> None:
        """Emit the bytes of a panel."""
        storage = self.form.storage
        width = min(storage.block, self.form.columns)
        first = bind(panel * (self.form.columns // width)) if not storage.channels else 0
        skipped = bind(panel * self.form.columns) if storage.channels else 0
        with serial(self.form.there(panel) // width if not storage.channels else 1) as at:
            block = bind(first + at)
            ratios = [self._ratio(block, place) for place in (0, HALF)]
            zeros = [bind(self._zero(block, place)) for place in (0, HALF)]
            columns = self.form.there(panel) if storage.channels else storage.block
            with serial(columns // storage.unit) as unit:
                column = bind(at * width + unit * storage.unit)
                source = skipped + block * storage.block + unit * storage.unit
                word = bind(T.floordiv(source, storage.unit) * storage.words)
                for half in (0, 1):
                    self._unpack_unit(word, column, half, (zeros[half], ratios[half]))

    def fetch(self, panel: Expr, part: Expr) -> None:
        """Ask for a part of what the next panel is made from: behind what this one is.

        Args:
            panel: Index of the panel.
            part: Index of the part, of `FETCHING` times as many as a panel has tiles.
        """
        storage, parts = self.form.storage, FETCHING * self.form.high
        words = self.form.columns * storage.bits // 32
        lines = -(-words * 2 // parts)
        for i in range(lines):
            line = part * lines + i
            word = (panel + 1) * words + T.floordiv(line, 2)
            prefetch(self.buffers["codes"], (self.tile, word, T.floormod(line, 2) * HALF), near=2)
        if storage.channels:
            return
        # all scales of the next tile are looked at before its first panel
        some = -(-self.form.columns // storage.block * self._scale_bytes // _LINE // parts)
        for i in range(max(1, some)):
            block = panel * (self.form.columns // storage.block)
            line = part * max(1, some) + i
            place = (self.tile + 1, block + T.floordiv(line * _LINE, self._scale_bytes), 0)
            prefetch(self.buffers["scale"], place, near=2)

    @property
    def _scale_bytes(self) -> int:
        """Bytes of a block's scales."""
        return 2 * TILE if self.form.storage.scale == "float16" else 4 * TILE

    def _unpack_unit(
        self, word: Expr, column: Expr, half: int, scaling: tuple[Expr, Expr | None]
    ) -> None:
        """Emit the codes that fill whole lanes, of 16 outputs."""
        storage = self.form.storage
        place = [[self.tile, word + i, half * HALF] for i in range(storage.words)]
        words = [bind(load(self.buffers["codes"], at, LANES)) for at in place]
        zero, ratio = scaling
        for quad in range(storage.unit // 4):
            if ratio is None:
                four = four_codes(storage, quad, words.__getitem__, LANES)
                value = _minus(four, zero)
            else:
                value = _rescaled(words[0], quad, zero, ratio)
            line, lane = self.address(column + 4 * quad)
            store(self.bytes, [line + half * HIGH, lane], value, LANES)

    def _zero(self, block: Expr, at: int) -> Expr:
        """Return the zero of 16 rows: in four bytes of a lane, or 16 times it in two halves."""
        storage = self.form.storage
        factor = 0x00100010 if self.form.rescaled else 0x01010101
        if not storage.zero_points:
            return integer(storage.middle * factor if storage.middle < 128 else -0x7F7F7F80, LANES)
        points = load(self.buffers["zero_point"], [self.tile, block, at], LANES)
        return cast("int32", points, LANES) * integer(factor, LANES)

    def _ratio(self, block: Expr, at: int) -> Expr | None:
        """Return a block's ratios, in 16 bits twice in each lane."""
        inverse = self._inverse[at // HALF]
        if inverse is None:
            return None
        value = intrinsic("llvm.rint", typed("float32", LANES), self._scale(block, at) * inverse)
        ratio = bind(cast("int32", value, LANES))
        return bind((ratio << integer(16, LANES)) | (ratio & integer(0xFFFF, LANES)))

    def _scale(self, block: Expr, at: int) -> Expr:
        value = load(self.buffers["scale"], [self.tile, block, at], LANES)
        return value if self.form.storage.scale == "float32" else cast("float32", value, LANES)

    @property
    def _most(self) -> int:
        """The largest ratio."""
        return 8 if self.form.storage.zero_points else 15

    def _ends(self) -> list[Expr | None]:
        storage = self.form.storage
        if storage.channels:
            return [bind(self._scale(T.int64(0), at)) for at in (0, HALF)]
        if not self.form.rescaled:
            return [None, None]
        return [bind(self._peak(at) * number(1 / self._most, LANES)) for at in (0, HALF)]

    def _peak(self, at: int) -> Expr:
        """Emit the largest magnitude of 16 rows' scales."""
        peak = Register(LANES)
        peak.set(number(0, LANES))
        with serial(self.form.storage.blocks) as block:
            size = intrinsic("llvm.fabs", typed("float32", LANES), self._scale(block, at))
            peak.set(T.max(peak.get(), size))
        return peak.get()

    def _inverses(self) -> list[Expr | None]:
        if not self.form.rescaled:
            return [None, None]
        one = number(1 << _FINE, LANES)
        tiny = number(1e-30, LANES)
        return [
            bind(T.Select(end > tiny, one / T.max(end, tiny), number(0, LANES)))
            for end in self.ends
        ]


def _rescaled(word: Expr, quad: int, zero: Expr, ratio: Expr) -> Expr:
    """Return four bytes a lane: codes of 4 bits less their zero, times a ratio."""
    pairs = 2 * LANES
    halves = bits("uint16", word, pairs)
    zeros, ratios = bits("int16", zero, pairs), bits("int16", ratio, pairs)
    found = []
    for odd in (0, 1):
        right = 8 * odd + 4 * quad - 4  # so that the code comes to lie in bits 4 to 7
        moved = halves >> splat(T.uint16(right), pairs) if right > 0 else halves
        if right < 0:
            moved = halves << splat(T.uint16(-right), pairs)
        code = bits("int16", moved & splat(T.uint16(0xF0), pairs), pairs)
        name = "llvm.x86.avx512.pmul.hr.sw.512"
        product = intrinsic(name, typed("int16", pairs), code - zeros, ratios)
        found.append(bits("uint16", product, pairs))
    even = found[0] & splat(T.uint16(0xFF), pairs)
    return bits("int32", even | (found[1] << splat(T.uint16(8), pairs)), LANES)


def _minus(codes: Expr, zero: Expr) -> Expr:
    """Return four differences of bytes in each lane."""
    left, right = (bits("int8", value, 4 * LANES) for value in (codes, zero))
    return bits("int32", left - right, LANES)
