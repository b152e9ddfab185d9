"""Many rows times integer weights on AMX's tiles of 16 x 64 bytes.

A thread takes a tile of 32 weights' rows and up to 512 rows of activations. Some 512 columns of the
weights at a time are unpacked to bytes (`linear_panel`), which stay in the first cache while all
rows pass, 32 at a time: four sums of 16 x 16, two tiles of activations, two of weights::

                      weights  [64 columns, 32] bytes less their zero
                      ┌──────┬──────┐
                      │ 6    │ 7    │  a tile's row: 16 outputs, four columns each
          activations ├──────┼──────┤
           ┌──────┐   │ 0    │ 1    │  int32 [32, 32]
           │ 4    │   ├──────┼──────┤
           │ 5    │   │ 2    │ 3    │
           └──────┘   └──────┴──────┘

Sums leave their tiles when the scales change: then they are stored, turned into numbers, scaled and
added up in memory. Scales of activations are one for all columns of a panel, and weights of 4 bits
get one scale a row on the way into it, so that is once a panel. Blocks of 6 and 8 bits keep their
scales, and sums leave the tiles after each. Blocks of 8 bits with zero points do not fit a byte,
and blocks of 16 leave three quarters of a tile empty: both use vectors instead.

Roofline: tiles multiply 64 columns of 32 x 32 results in 64 cycles, 512 columns in 512. Storing the
sums takes 140 cycles more, scaling them as many; unpacking 512 columns takes 1,900, shared by all
rows. Vectors and tiles do not overlap here as they could: that is 40 % of the peak for 128 rows and
60 % for 512, less what waits for memory. So results are asked for before they are written, and what
the next panel is made from while this one's first rows pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from llmopt.backends.tvm.kernels.amx import HIGH, Tiles, four_products
from llmopt.backends.tvm.kernels.linear.epilogue import Epilogue
from llmopt.backends.tvm.kernels.linear.gemm import pieces
from llmopt.backends.tvm.kernels.linear.panel import (
    DEEP,
    FETCHING,
    LANES,
    Panel,
    PanelSizes,
)
from llmopt.backends.tvm.kernels.linear.quantize import (
    Activations,
    allocate_tiles,
    quantize_row,
)
from llmopt.backends.tvm.kernels.linear.storage import HALF, TILE, Storage, tiles
from llmopt.backends.tvm.kernels.script import (
    Expr,
    T,
    bind,
    cast,
    load,
    number,
    parallel,
    serial,
    splat,
    store,
)

_STRIDE: Final = 64  # bytes
_AT_ONCE: Final = 32
_FEW, _MANY = 128, 512
_NEAR: Final = 1 << 20
"""Bytes of rows that every tile of weights reads again: half of the second cache."""


def fits(storage: Storage) -> bool:
    """Return whether tiles multiply weights that are stored so."""
    return storage.block % TILE == 0 and not (storage.zero_points and storage.bits == 8)


@dataclass(frozen=True)
class _AmxTile:
    """A tile of weights times some rows.

    Args:
        panel: Panel of its weights.
        activations: The rounded rows, padded to a multiple of 32.
        unit: The processor's tiles.
        epilogue: Epilogue of the product.
        first: The first row.
        steps: Number of steps of 32 rows.
        sums: [32, 32] int32, of one step.
        results: [rows, 32] float32, what earlier runs summed up.
    """

    panel: Panel
    activations: Activations
    unit: Tiles
    epilogue: Epilogue
    first: Expr
    steps: Expr
    sums: Any
    results: Any

    def emit(self) -> None:
        """Emit all panels and rows."""
        form = self.panel.form
        self.unit.configure(form.depth)
        if form.count > 1:
            with serial(form.count - 1) as index:
                self._panel(index, last=False)
        self._panel(form.count - 1, last=True)
        self.unit.release()

    def _panel(self, index: Expr, *, last: bool) -> None:
        """Emit a panel times all rows; while the first pass, the next panel is asked for."""
        self.panel.unpack(index)
        ahead = bind(T.min(self.steps, T.int64(FETCHING)))
        with serial(ahead) as step:
            self._rows(index, step, last=last, fetch=True)
        with serial(self.steps - ahead) as step:
            self._rows(index, ahead + step, last=last, fetch=False)

    def _rows(self, index: Expr, step: Expr, *, last: bool, fetch: bool) -> None:
        """Emit 32 rows of the result, or what there is of them, for the columns of a panel."""
        form, start = self.panel.form, bind(step * _AT_ONCE)
        row = bind(self.first + start)
        there = bind(T.min(self.epilogue.buffers["x"].shape[0] - row, T.int64(_AT_ONCE)))

        def ahead(column: Expr) -> None:
            """Ask for what is needed next, a part for each 64 columns."""
            part = T.floordiv(column, DEEP)
            if fetch:
                self.panel.fetch(index, bind(step * form.high + part))
            if last:
                each = -(-_AT_ONCE // form.high)
                for i in range(each):
                    self.epilogue.fetch(
                        T.min(row + part * each + i, row + there - 1), self.panel.tile
                    )

        rows = (row, there, start)
        if form.kept:
            self._run((index, 0), rows, ahead, last=last)
            return
        with serial(form.there(index) // form.storage.block) as run:
            self._run((index, run), rows, ahead, last=False)
        if last:
            with serial(there) as at:
                vectors = [load(self.results, [start + at, place], LANES) for place in (0, HALF)]
                self.epilogue.write(row + at, self.panel.tile, vectors)

    def _run(
        self,
        run: tuple[Expr, Expr],
        rows: tuple[Expr, Expr, Expr],
        ahead: Callable[[Expr], None],
        *,
        last: bool,
    ) -> None:
        """Emit the sums of columns that share their scales."""
        form, (row, there, step), (index, number_of) = self.panel.form, rows, run
        before = number_of * form.storage.block if not form.kept else 0
        self._multiply((index, before), row, ahead)
        start = bind(index * form.columns + before)
        scales = self.panel.scales(T.floordiv(start, form.storage.block))
        group = bind(T.floordiv(start, form.group))
        with serial(there) as at:
            factor = bind(splat(load(self.activations.scale, [row + at, group], 1), LANES))
            vectors = [
                self._scaled(at, place, factor, scale)
                for place, scale in zip((0, HALF), scales, strict=True)
            ]
            if form.count > 1 or not form.kept:
                vectors = [
                    self._added(value, start, [step + at, place])
                    for place, value in zip((0, HALF), vectors, strict=True)
                ]
            if last:
                vectors = [value * end for value, end in zip(vectors, self.panel.ends, strict=True)]
                self.epilogue.write(row + at, self.panel.tile, vectors)
                return
            for place, value in zip((0, HALF), vectors, strict=True):
                store(self.results, [step + at, place], value, LANES)

    def _scaled(self, row: Expr, column: int, factor: Expr, scale: Expr | None) -> Expr:
        value = cast("float32", load(self.sums, [row, column], LANES), LANES)
        return value * (factor if scale is None else factor * scale)

    def _added(self, value: Expr, start: Expr, index: list[Expr]) -> Expr:
        """Return a value and what earlier columns summed up."""
        return value + T.Select(start > 0, load(self.results, index, LANES), number(0, LANES))

    def _multiply(self, start: tuple[Expr, Expr], row: Expr, ahead: Callable[[Expr], None]) -> None:
        """Emit the integer sums of columns from one of a panel on."""
        unit, panel, form, (index, before) = self.unit, self.panel, self.panel.form, start
        for tile in range(4):
            unit.zero(tile)
        columns = form.there(index) if form.kept else form.storage.block
        with serial(-(-columns // form.depth)) as step:
            column = before + step * form.depth
            codes = self._codes_at(row, index * form.columns + column)
            weights = panel.address(column)
            unit.load(4, self.activations.codes, codes, _STRIDE)
            below = (codes[0] + self.activations.tiles * HIGH, codes[1])
            unit.load(5, self.activations.codes, below, _STRIDE)
            unit.load(6, panel.bytes, weights, _STRIDE)
            unit.load(7, panel.bytes, (weights[0] + HIGH, 0), _STRIDE)
            four_products(unit, halves=False)
            ahead(column)
        for tile in range(4):
            unit.store(tile, self.sums, (HIGH * (tile // 2), LANES * (tile % 2)), 4 * TILE)

    def _codes_at(self, row: Expr, column: Expr) -> tuple[Expr, Expr]:
        """Return where the tile of a first row's codes begins."""
        line, word = self.activations.address(row, T.floordiv(column, 4))
        return bind(line), word


def emit(
    buffers: Mapping[str, Any], epilogue: Epilogue, k: int, storage: Storage, unit: Tiles
) -> None:
    """Emit the kernel of many rows.

    Args:
        buffers: ``x`` [M, K], the weight's arrays, what the epilogue reads, ``y`` [M, N].
        epilogue: Epilogue of the product.
        k: Columns of the weight.
        storage: Layout of the weight; see `fits`.
        unit: The processor's tiles.
    """
    m, form = buffers["x"].shape[0], PanelSizes.of(storage)
    padded = T.floordiv(m + _AT_ONCE - 1, _AT_ONCE) * _AT_ONCE
    activations = allocate_tiles(padded, storage.columns, form.group)
    with parallel(m) as row:
        quantize_row(buffers["x"], row, k, storage, activations)
    rows = max(_FEW, min(_MANY, _NEAR // storage.columns // _AT_ONCE * _AT_ONCE))

    def piece(tile: Expr, first: Expr, steps: Expr) -> None:
        sums = T.alloc_buffer((_AT_ONCE, TILE), "int32")
        results = T.alloc_buffer((rows + _AT_ONCE, TILE), "float32")
        panel = Panel(form, buffers, tile)
        _AmxTile(panel, activations, unit, epilogue, first, steps, sums, results).emit()

    count = tiles(epilogue.n, paired=epilogue.paired)
    pieces(m, count, (_AT_ONCE, rows), piece)
