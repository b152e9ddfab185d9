"""Attention of many queries, blocked, with online softmax; scores never leave the cache.

A task is one block of N rows of one key head. Rows are (query, head) pairs, s·R + r for the R heads
that share a key head, so keys and values are read once for all of them. **Lanes are rows**: every
score, maximum and sum is a vector over rows, nothing is ever added across lanes, and K and V are
read as they lie, one number broadcast at a time::

    Q, turned once          scores of 64 keys             y = V P, turned back once
       [D, N]                  [64, N]                       [D, N]
    d ┌───────────┐         t ┌───────────┐               d ┌───────────┐
      │ lane: row │ · K[t,d]  │ lane: row │ exp2, · V[t,d]  │ lane: row │
      └───────────┘           └───────────┘                 └───────────┘

The inner loops hold a tile of 4 keys (or channels) x N rows in registers, N of 4 vectors: 16 fused
multiply-adds for 4 loads and 4 numbers broadcast from memory. With 16 registers, 2 keys x N.

Roofline: 4·S·T·H·D operations (half of them where causal) at the fp32 peak; exponentials and
maxima are some 15 instructions a vector against 2·D multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels import amx
from llmopt.backends.tvm.kernels.activations import exp2
from llmopt.backends.tvm.kernels.attention import tiles as attention_tiles
from llmopt.backends.tvm.kernels.attention.addresses import Addresses
from llmopt.backends.tvm.kernels.attention.element_types import BfloatPairs, Floats, Numbers
from llmopt.backends.tvm.kernels.attention.form import UNSEEN, AttentionForm
from llmopt.backends.tvm.kernels.vectors import (
    Registers,
    fitting,
    load,
    splat,
    store,
    transposed,
    variable,
)


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of the blocks.

    Args:
        lanes: Lanes of a vector of rows.
        vectors: Vectors of rows in a block.
        tile: Keys that stay in registers together.
        deep: Channels that do: the most up to ``tile`` that divide the width of a head.
        square: Lanes of a vector of channels; divides the width of a head and ``lanes``.
        numbers: Element type of the products.
        unit: AMX's tiles, where they multiply; `attention_tiles` then has the products.
        keys: Keys in a block; a multiple of ``tile``.
    """

    lanes: int
    vectors: int
    tile: int
    deep: int
    square: int
    numbers: Numbers
    unit: amx.Tiles | None = None
    keys: int = 64

    @property
    def rows(self) -> int:
        """N, rows in a block."""
        return self.lanes * self.vectors

    @classmethod
    def of(cls, form: AttentionForm, features: Features) -> BlockSizes:
        """Return sizes that fit the registers: 32 of them with AVX-512 and NEON, else 16."""
        tile = 4 if features.avx512 or features.neon else 2
        deep = next(n for n in range(tile, 0, -1) if form.width % n == 0)
        pairs = form.rounded and features.avx512bf16 and form.width % 16 == 0
        numbers = BfloatPairs() if pairs else Floats()
        square = fitting(features, form.width // numbers.per)
        if pairs and features.amx_bf16 and form.width % attention_tiles.STEP == 0:
            step = attention_tiles.STEP
            return cls(features.lanes, 4, step, deep, square, numbers, amx.Intrinsics())
        return cls(features.lanes, 4, tile, deep, square, numbers)


@dataclass(frozen=True)
class RowBlock:
    """A block of rows, and what its task keeps in the first-level cache.

    Args:
        n: Sizes.
        io: Addresses of all buffers.
        b: The sequence.
        g: The key head.
        turned: [D, N], queries times the scale; pairs of bfloat16 are pairs of channels.
        held: A block of keys [keys, D], pairs of channels, then of values [keys, D], pairs of keys.
        scores: [keys, N] float32.
        weights: [keys, N], pairs of keys.
        summed: [D, N] float32, weighted values so far.
        line: [N] int64, of each row in ``q`` and ``y``.
        column: [N] int64, where the row's numbers begin there.
        position: [N] int32, of each row among the keys.
        peak: [N] float32, the largest score of the blocks before.
        fresh: [N] float32, the same with this block.
        shrink: [N] float32, what sums of the blocks before are multiplied by.
        total: [N] float32, sum of the weights so far.
    """

    n: BlockSizes
    io: Addresses
    b: Any
    g: Any
    transposed: Any
    resident: Any
    scores: Any
    weights: Any
    summed: Any
    line: Any
    column: Any
    position: Any
    peak: Any
    fresh: Any
    shrink: Any
    total: Any

    @classmethod
    def allocated(cls, n: BlockSizes, io: Addresses, b: Any, g: Any) -> RowBlock:
        """Return a task with its buffers, allocated where the text is being read."""
        width, rows, (per, dtype) = io.form.width, n.rows, (n.numbers.per, n.numbers.dtype)
        elements = [(width // per, rows), (n.keys * width // per,)]
        first = [T.alloc_buffer(shape, dtype) for shape in elements]
        scores = T.alloc_buffer((n.keys, rows), "float32")
        weights = scores if per == 1 else T.alloc_buffer((n.keys // per, rows), dtype)
        summed = T.alloc_buffer((width, rows), "float32")
        dtypes = ["int64", "int64", "int32"] + ["float32"] * 4
        lines = [T.alloc_buffer((rows,), each) for each in dtypes]
        return cls(n, io, b, g, *[*first, scores, weights, summed, *lines])

    def vectors(self, buffer: Any, *place: Any) -> list[Any]:
        """Return all rows' vectors of a buffer [..., N] at a place of its first axes."""
        return [self.vector(buffer, *place, c) for c in range(self.n.vectors)]

    def vector(self, buffer: Any, *place: Any) -> Any:
        """Return vector c of a buffer [..., N] at ``place = (..., c)``."""
        return load(buffer, (*place[:-1], place[-1] * self.n.lanes), 0, self.n.lanes)

    def put(self, buffer: Any, index: tuple[Any, ...], value: Any) -> None:
        """Write vector c of a buffer [..., N] at ``place = (..., c)``."""
        store((buffer, (*index[:-1], index[-1] * self.n.lanes)), 0, value)

    def transpose_queries(self, row: Any, channel: Any) -> None:
        """Write a square of queries, scaled, row and channel exchanged."""
        factor = splat(self.io.form.factor, self.n.square)
        vectors = [
            load(self.io.q, (self.line[row + i], self.column[row + i]), channel, self.n.square)
            for i in range(self.n.square)
        ]
        channels, per = transposed([vector * factor for vector in vectors]), self.n.numbers.per
        for i in range(0, self.n.square, per):
            element = self.n.numbers.packed(channels[i : i + per])
            store((self.transposed, ((channel + i) // per, row)), 0, element)

    def transpose_results(self, row: Any, channel: Any) -> None:
        """Write a square of results, divided by the rows' totals."""
        part = T.bind(load(self.total, (row,), 0, self.n.square))
        vectors = [
            load(self.summed, (channel + i, row), 0, self.n.square) * part
            for i in range(self.n.square)
        ]
        for i, vector in enumerate(transposed(vectors)):
            store((self.io.y, (self.line[row + i], self.column[row + i])), channel, vector)

    def hold_key(self, key: Any, slot: Any) -> None:
        """Copy a key to a slot of the block."""
        n, place = self.n, self.io.key(self.b, self.g, key)
        for d in range(0, self.io.form.width, n.square * n.numbers.per):
            starts = range(d, d + n.square * n.numbers.per, n.square)
            vectors = [load(self.io.k, place, start, n.square) for start in starts]
            first = slot * (self.io.form.width // n.numbers.per)
            store((self.resident, (first,)), d // n.numbers.per, n.numbers.joined(vectors))

    def hold_values(self, keys: Sequence[Any], slot: Any) -> None:
        """Copy as many values as an element has numbers to a slot of the block."""
        places = [self.io.value(self.b, self.g, key) for key in keys]
        for d in range(0, self.io.form.width, self.n.square):
            vectors = [load(self.io.v, place, d, self.n.square) for place in places]
            target = (self.resident, (slot * self.io.form.width,))
            store(target, d, self.n.numbers.packed(vectors))

    def add_key_products(self, acc: Registers, slot: Any, d: Any) -> None:
        """Add element d of a tile of keys times element d of all rows."""
        width = self.io.form.width // self.n.numbers.per
        keys = [self.resident[(slot + r) * width + d] for r in range(self.n.tile)]
        vectors = [splat(key, self.n.lanes) for key in keys]
        acc.add_products(vectors, self.vectors(self.transposed, d), self.n.numbers.multiplied)

    def keep_scores(self, acc: Registers, key: Any, slot: Any) -> None:
        """Write a tile's scores, hidden where a row does not see the key; raise the maxima."""
        biases = [T.bind(self.io.bias(self.b, key + r)) for r in range(self.n.tile)]
        for c in range(self.n.vectors):
            position, best = T.bind(self.vector(self.position, c)), self.vector(self.fresh, c)
            for r, bias in enumerate(biases):
                score = self.io.capped(acc.get(r, c)) + splat(bias, self.n.lanes)
                score = T.bind(self.io.windowed(score, key + r, position))
                self.put(self.scores, (slot + r, c), score)
                best = T.max(best, score)
            self.put(self.fresh, (c,), best)

    def shrunk(self, first: Any) -> Callable[[int, int], Any]:
        """Return what is left of the sums of channels from ``first`` on: by row, by column."""
        return lambda r, c: self.vector(self.summed, first + r, c) * self.vector(self.shrink, c)

    def add_value_products(self, acc: Registers, slot: Any, first: Any) -> None:
        """Add channels from ``first`` on of an element of values, weighted, to all rows' sums."""
        values = [self.resident[slot * self.io.form.width + first + r] for r in range(self.n.deep)]
        vectors = [splat(value, self.n.lanes) for value in values]
        acc.add_products(vectors, self.vectors(self.weights, slot), self.n.numbers.multiplied)

    def keep_sums(self, acc: Registers, first: Any) -> None:
        """Write the sums of channels from ``first`` on."""
        for r in range(self.n.deep):
            for c in range(self.n.vectors):
                self.put(self.summed, (first + r, c), acc.get(r, c))


def _start(w: RowBlock, first: Any) -> None:
    """Turn the block's queries, scaled; rows past the end repeat the last row."""
    ratio, width = w.io.form.ratio, w.io.form.width
    with T.serial(w.n.rows) as i:
        row = variable(T.min(first + i, w.io.length * ratio - 1))
        T.buffer_store(w.line, w.b * w.io.length + row // ratio, [i])
        T.buffer_store(w.column, (w.g * ratio + row % ratio) * width, [i])
        T.buffer_store(w.position, T.cast(w.io.past + row // ratio, "int32"), [i])
        T.buffer_store(w.peak, T.float32(UNSEEN), [i])
        T.buffer_store(w.total, T.float32(0.0), [i])
    with T.grid(w.n.rows // w.n.square, width // w.n.square) as (i, d):
        w.transpose_queries(i * w.n.square, d * w.n.square)
    with T.serial(width) as d:
        for c in range(w.n.vectors):
            w.put(w.summed, (d, c), splat(0.0, w.n.lanes))


def _hold_keys(w: RowBlock, origin: Any, count: Any) -> None:
    """Copy keys side by side, so that they do not evict each other from the cache."""
    with T.serial(count) as t:
        w.hold_key(variable(T.min(origin + t, w.io.keys - 1)), t)


def _hold_values(w: RowBlock, origin: Any, count: Any) -> None:
    """Copy values side by side."""
    per = w.n.numbers.per
    with T.serial(count // per) as t:
        keys = (origin + t * per + i for i in range(per))
        w.hold_values([variable(T.min(key, w.io.keys - 1)) for key in keys], t)


def _score(w: RowBlock, origin: Any, count: Any) -> None:
    """Multiply a block of keys with all rows, tile by tile."""
    for c in range(w.n.vectors):
        w.put(w.fresh, (c,), w.vector(w.peak, c))
    with T.serial(count // w.n.tile) as j:
        acc = Registers.allocated(w.n.tile, w.n.vectors, w.n.lanes)
        acc.clear()
        with T.serial(w.io.form.width // w.n.numbers.per) as d:
            w.add_key_products(acc, j * w.n.tile, d)
        w.keep_scores(acc, origin + j * w.n.tile, j * w.n.tile)


def _weigh(w: RowBlock, count: Any) -> None:
    """Turn a block's scores into weights; keep their sums and what older sums shrink by."""
    total = Registers.allocated(1, w.n.vectors, w.n.lanes)
    fresh = [T.bind(vector) for vector in w.vectors(w.fresh)]
    for c in range(w.n.vectors):
        shrink = T.bind(exp2(w.vector(w.peak, c) - fresh[c]))
        total.put(0, c, w.vector(w.total, c) * shrink)
        w.put(w.shrink, (c,), shrink)
        w.put(w.peak, (c,), fresh[c])
    per = w.n.numbers.per
    with T.serial(count // per) as t:
        for c in range(w.n.vectors):
            weights = [
                T.bind(exp2(w.vector(w.scores, t * per + i, c) - fresh[c])) for i in range(per)
            ]
            w.put(w.weights, (t, c), w.n.numbers.packed(weights))
            total.put(0, c, total.get(0, c) + sum(weights[1:], weights[0]))
    for c in range(w.n.vectors):
        w.put(w.total, (c,), total.get(0, c))


def _add_values(w: RowBlock, count: Any) -> None:
    """Add a block's values, weighted, to what older blocks left."""
    with T.serial(w.io.form.width // w.n.deep) as j:
        acc = Registers.allocated(w.n.deep, w.n.vectors, w.n.lanes)
        acc.fill(w.shrunk(j * w.n.deep))
        with T.serial(count // w.n.numbers.per) as t:
            w.add_value_products(acc, t, j * w.n.deep)
        w.keep_sums(acc, j * w.n.deep)


def _finish(w: RowBlock) -> None:
    """Divide by the sums of weights and turn back; rows that saw nothing are 0."""
    for c in range(w.n.vectors):
        total, zero = T.bind(w.vector(w.total, c)), splat(0.0, w.n.lanes)
        w.put(w.total, (c,), T.Select(total > zero, splat(1.0, w.n.lanes) / total, zero))
    with T.grid(w.n.rows // w.n.square, w.io.form.width // w.n.square) as (i, d):
        w.transpose_results(i * w.n.square, d * w.n.square)


def _attend(w: RowBlock, row: Any) -> None:
    """Compute the block of rows from ``row`` on."""
    _start(w, row)
    if w.n.unit is not None:
        w.n.unit.configure()
    begin = variable(w.io.begin(row))
    end = variable(w.io.end(row + w.n.rows - 1))
    with T.serial(T.ceildiv(end - begin, w.n.keys)) as j:
        origin = variable(begin + j * w.n.keys)
        # whole tiles: what is past the end is hidden, and weighs nothing
        count = variable(T.min(T.ceildiv(end - origin, w.n.tile) * w.n.tile, w.n.keys))
        _hold_keys(w, origin, count)
        if w.n.unit is not None:
            attention_tiles.score(w, w.n.unit, origin, count)
            _weigh(w, count)
            attention_tiles.hold_values(w, origin, count)
            attention_tiles.add_values(w, w.n.unit, count)
        else:
            _score(w, origin, count)
            _weigh(w, count)
            _hold_values(w, origin, count)
            _add_values(w, count)
    if w.n.unit is not None:
        w.n.unit.release()
    _finish(w)


def attend(io: Addresses, features: Features, batch: Any) -> None:
    """Compute all blocks, with the code that the numbers need."""
    n = BlockSizes.of(io.form, features)
    if not n.numbers.code:
        _attend_blocks(n, io, batch)
        return
    with T.attr(T.int32(0), "pragma_import_llvm", n.numbers.code):
        _attend_blocks(n, io, batch)


def _attend_blocks(n: BlockSizes, io: Addresses, batch: Any) -> None:
    """Compute all blocks; early and late ones alternate, since late ones see more keys."""
    groups, blocks = io.form.kv_heads, variable(T.ceildiv(io.length * io.form.ratio, n.rows))
    with T.parallel(batch * groups * blocks) as task:
        step = variable(task % blocks)
        transpose_queries = T.if_then_else(step % 2 == 0, step // 2, blocks - 1 - step // 2)
        row, head = variable(transpose_queries * n.rows), variable(task // blocks)
        b, g = variable(head // groups), variable(head % groups)
        _attend(RowBlock.allocated(n, io, b, g), row)
