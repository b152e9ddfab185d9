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

The inner loops hold a tile of ``tile`` keys (or channels) x N rows in registers: with AVX-512
8 x 2 vectors, 16 fused multiply-adds for 2 loads and 8 broadcasts from memory.

Roofline: 4·S·T·H·D operations (half of them where causal) at the fp32 peak; exponentials and
maxima are some 15 instructions a vector against 2·D multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels.activations import exp2
from llmopt.backends.tvm.kernels.attention_form import UNSEEN, Attention
from llmopt.backends.tvm.kernels.attention_places import Places
from llmopt.backends.tvm.kernels.vectors import (
    Registers,
    at,
    fitting,
    load,
    splat,
    store,
    transposed,
)


@dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks.

    Args:
        lanes: Of a vector of rows.
        vectors: Vectors of rows in a block.
        tile: Keys that stay in registers together.
        deep: Channels that do: the most up to ``tile`` that divide the width of a head.
        square: Lanes of a vector of channels; divides the width of a head and ``lanes``.
        keys: Keys in a block; a multiple of ``tile``.
    """

    lanes: int
    vectors: int
    tile: int
    deep: int
    square: int
    keys: int = 32

    @property
    def rows(self) -> int:
        """N, rows in a block."""
        return self.lanes * self.vectors

    @classmethod
    def of(cls, form: Attention, features: Features) -> Blocks:
        """Return sizes that fit the registers: 32 of them with AVX-512 and NEON, else 16."""
        vectors, tile = (2, 8) if features.avx512 else (3, 8) if features.neon else (3, 4)
        deep = next(n for n in range(tile, 0, -1) if form.width % n == 0)
        return cls(features.lanes, vectors, tile, deep, fitting(features, form.width))


@dataclass(frozen=True)
class Work:
    """A block of rows, and what its task keeps in the first-level cache.

    Args:
        n: Sizes.
        io: Where everything is.
        b: The sequence.
        g: The key head.
        turned: [D, N] float32, queries times the scale.
        held: [keys, D] float32, a block of keys, then its values.
        scores: [keys, N] float32, scores, then weights.
        summed: [D, N] float32, weighted values so far.
        line: [N] int64, of each row in ``q`` and ``y``.
        column: [N] int64, where the row's numbers begin there.
        position: [N] int32, of each row among the keys.
        peak: [N] float32, the largest score of the blocks before.
        fresh: [N] float32, the same with this block.
        shrink: [N] float32, what sums of the blocks before are multiplied by.
        total: [N] float32, sum of the weights so far.
    """

    n: Blocks
    io: Places
    b: Any
    g: Any
    turned: Any
    held: Any
    scores: Any
    summed: Any
    line: Any
    column: Any
    position: Any
    peak: Any
    fresh: Any
    shrink: Any
    total: Any

    @classmethod
    def allocated(cls, n: Blocks, io: Places, b: Any, g: Any) -> Work:
        """Return a task with its buffers, allocated where the text is being read."""
        width, rows = io.form.width, n.rows
        shapes = [(width, rows), (n.keys, width), (n.keys, rows), (width, rows), *[(rows,)] * 7]
        dtypes = ["float32"] * 4 + ["int64", "int64", "int32"] + ["float32"] * 4
        pairs = zip(shapes, dtypes, strict=True)
        return cls(n, io, b, g, *[T.alloc_buffer(shape, dtype) for shape, dtype in pairs])

    def vectors(self, buffer: Any, *place: Any) -> list[Any]:
        """Return all rows' vectors of a buffer [..., N] at a place of its first axes."""
        return [self.vector(buffer, *place, c) for c in range(self.n.vectors)]

    def vector(self, buffer: Any, *place: Any) -> Any:
        """Return vector c of a buffer [..., N] at ``place = (..., c)``."""
        return load(buffer, (*place[:-1], place[-1] * self.n.lanes), 0, self.n.lanes)

    def put(self, buffer: Any, place: tuple[Any, ...], value: Any) -> None:
        """Write vector c of a buffer [..., N] at ``place = (..., c)``."""
        store((buffer, (*place[:-1], place[-1] * self.n.lanes)), 0, value)

    def turn(self, row: Any, channel: Any) -> None:
        """Write a square of queries, scaled, row and channel exchanged."""
        factor = splat(self.io.form.factor, self.n.square)
        vectors = [
            load(self.io.q, (self.line[row + i], self.column[row + i]), channel, self.n.square)
            for i in range(self.n.square)
        ]
        for i, vector in enumerate(transposed([vector * factor for vector in vectors])):
            store((self.turned, (channel + i, row)), 0, vector)

    def turn_back(self, row: Any, channel: Any) -> None:
        """Write a square of results, divided by the rows' totals."""
        part = T.bind(load(self.total, (row,), 0, self.n.square))
        vectors = [
            load(self.summed, (channel + i, row), 0, self.n.square) * part
            for i in range(self.n.square)
        ]
        for i, vector in enumerate(transposed(vectors)):
            store((self.io.y, (self.line[row + i], self.column[row + i])), channel, vector)

    def add_key_products(self, acc: Registers, slot: Any, d: Any) -> None:
        """Add number d of a tile of keys times number d of all rows."""
        numbers = [splat(self.held[slot + r, d], self.n.lanes) for r in range(self.n.tile)]
        acc.add_products(numbers, self.vectors(self.turned, d))

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
        """Add channels from ``first`` on of a value, weighted, to the sums of all rows."""
        numbers = [splat(self.held[slot, first + r], self.n.lanes) for r in range(self.n.deep)]
        acc.add_products(numbers, self.vectors(self.scores, slot))

    def keep_sums(self, acc: Registers, first: Any) -> None:
        """Write the sums of channels from ``first`` on."""
        for r in range(self.n.deep):
            for c in range(self.n.vectors):
                self.put(self.summed, (first + r, c), acc.get(r, c))


@T.inline
def _start(w: Any, first: Any) -> None:
    """Turn the block's queries, scaled; rows past the end repeat the last row."""
    for i in T.serial(w.n.rows):
        row = T.min(first + i, w.io.length * w.io.form.ratio - 1)
        w.line[i] = w.b * w.io.length + row // w.io.form.ratio
        w.column[i] = (w.g * w.io.form.ratio + row % w.io.form.ratio) * w.io.form.width
        w.position[i] = T.cast(w.io.past + row // w.io.form.ratio, "int32")
        w.peak[i] = T.float32(UNSEEN)
        w.total[i] = T.float32(0.0)
    for i in T.serial(w.n.rows // w.n.square):
        for d in T.serial(w.io.form.width // w.n.square):
            w.turn(i * w.n.square, d * w.n.square)
    for d in T.serial(w.io.form.width):
        for c in T.unroll(w.n.vectors):
            w.put(w.summed, (d, c), splat(0.0, w.n.lanes))


@T.inline
def _hold(w: Any, buffer: Any, place: Any, origin: Any, count: Any) -> None:
    """Copy keys or values side by side, so that they do not evict each other from the cache."""
    for t in T.serial(count):
        for d in T.serial(w.io.form.width // w.n.square):
            store(
                (w.held, (t, 0)),
                d * w.n.square,
                load(
                    buffer,
                    place(w.b, w.g, T.min(origin + t, w.io.keys - 1)),
                    d * w.n.square,
                    w.n.square,
                ),
            )


@T.inline
def _score(w: Any, origin: Any, count: Any) -> None:
    """Multiply a block of keys with all rows, tile by tile."""
    for c in T.unroll(w.n.vectors):
        w.put(w.fresh, (c,), w.vector(w.peak, c))
    for j in T.serial(T.ceildiv(count, w.n.tile)):
        acc = T.meta_var(Registers.allocated(w.n.tile, w.n.vectors, w.n.lanes))
        acc.clear()
        for d in T.serial(w.io.form.width):
            w.add_key_products(acc, j * w.n.tile, d)
        w.keep_scores(acc, origin + j * w.n.tile, j * w.n.tile)


@T.inline
def _weigh(w: Any, count: Any) -> None:
    """Turn a block's scores into weights; keep their sums and what older sums shrink by."""
    for c in T.unroll(w.n.vectors):
        fresh: T.let = w.vector(w.fresh, c)
        shrink: T.let = exp2(w.vector(w.peak, c) - fresh)
        total = T.alloc_buffer((w.n.lanes,), "float32")
        total[at(0, w.n.lanes)] = w.vector(w.total, c) * shrink
        for t in T.serial(T.ceildiv(count, w.n.tile) * w.n.tile):
            weight: T.let = exp2(w.vector(w.scores, t, c) - fresh)
            w.put(w.scores, (t, c), weight)
            total[at(0, w.n.lanes)] = load(total, (0,), 0, w.n.lanes) + weight
        w.put(w.peak, (c,), fresh)
        w.put(w.shrink, (c,), shrink)
        w.put(w.total, (c,), load(total, (0,), 0, w.n.lanes))


@T.inline
def _add_values(w: Any, count: Any) -> None:
    """Add a block's values, weighted, to what older blocks left."""
    for j in T.serial(w.io.form.width // w.n.deep):
        acc = T.meta_var(Registers.allocated(w.n.deep, w.n.vectors, w.n.lanes))
        acc.fill(w.shrunk(j * w.n.deep))
        for t in T.serial(count):
            w.add_value_products(acc, t, j * w.n.deep)
        w.keep_sums(acc, j * w.n.deep)


@T.inline
def _finish(w: Any) -> None:
    """Divide by the sums of weights and turn back; rows that saw nothing are 0."""
    for i in T.serial(w.n.rows):
        w.total[i] = T.if_then_else(
            w.total[i] > T.float32(0.0), T.float32(1.0) / w.total[i], T.float32(0.0)
        )
    for i in T.serial(w.n.rows // w.n.square):
        for d in T.serial(w.io.form.width // w.n.square):
            w.turn_back(i * w.n.square, d * w.n.square)


@T.inline
def _attend(w: Any, row: Any) -> None:
    """Compute the block of rows from ``row`` on."""
    _start(w, row)
    begin = w.io.begin(row)
    end = w.io.end(row + w.n.rows - 1)
    for j in T.serial(T.ceildiv(end - begin, w.n.keys)):
        origin = begin + j * w.n.keys
        count = T.min(end - origin, w.n.keys)
        _hold(w, w.io.k, w.io.key, origin, T.ceildiv(count, w.n.tile) * w.n.tile)
        _score(w, origin, count)
        _weigh(w, count)
        _hold(w, w.io.v, w.io.value, origin, count)
        _add_values(w, count)
    _finish(w)


@T.inline
def _attend_all(n: Any, io: Any, batch: Any) -> None:
    """Compute all blocks; early and late ones alternate, since late ones see more keys.

    What is computed once a task is a variable, not a name for an expression: TVM would write the
    divisions out wherever they are used, and take minutes over them.
    """
    blocks = T.ceildiv(io.length * io.form.ratio, n.rows)
    for task in T.parallel(batch * io.form.kv_heads * blocks):
        step = task % blocks
        row = T.if_then_else(step % 2 == 0, step // 2, blocks - 1 - step // 2) * n.rows
        head = task // blocks
        b = head // io.form.kv_heads
        g = head % io.form.kv_heads
        _attend(Work.allocated(n, io, b, g), row)


def packed(form: Attention, features: Features) -> Any:
    """Return the function (qkv, mask, y)."""
    n, form_ = Blocks.of(form, features), form
    width = (form.heads + 2 * form.kv_heads) * form.width

    @T.prim_func(s_tir=True)
    def attention(qkv: T.handle, mask: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        rows, batch, keys = T.int64(), T.int64(), T.int64()
        parts = T.match_buffer(qkv, (rows, width), "float32")
        real = T.match_buffer(mask, (batch, keys), "int64")
        out = T.match_buffer(y, (rows, form_.heads * form_.width), "float32")
        length = rows // batch
        _attend_all(n, Places(form_, parts, parts, parts, real, out, length, keys), batch)

    return attention


def separate(form: Attention, features: Features) -> Any:
    """Return the function (q, k, v, mask, y)."""
    n, form_ = Blocks.of(form, features), form

    @T.prim_func(s_tir=True)
    def attention(q: T.handle, k: T.handle, v: T.handle, mask: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        rows, held, batch, keys = T.int64(), T.int64(), T.int64(), T.int64()
        queries = T.match_buffer(q, (rows, form_.heads * form_.width), "float32")
        kept = T.match_buffer(k, (held, form_.kv_heads * form_.width), "float32")
        values = T.match_buffer(v, (held, form_.kv_heads * form_.width), "float32")
        real = T.match_buffer(mask, (batch, keys), "int64")
        out = T.match_buffer(y, (rows, form_.heads * form_.width), "float32")
        length = rows // batch
        _attend_all(n, Places(form_, queries, kept, values, real, out, length, keys), batch)

    return attention


def cached(form: Attention, features: Features) -> Any:
    """Return the function (q, k_cache, v_cache, mask, y)."""
    n, form_ = Blocks.of(form, features), form

    @T.prim_func(s_tir=True)
    def attention(
        q: T.handle, k_cache: T.handle, v_cache: T.handle, mask: T.handle, y: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        rows, batch, keys, room = T.int64(), T.int64(), T.int64(), T.int64()
        queries = T.match_buffer(q, (rows, form_.heads * form_.width), "float32")
        kept = T.match_buffer(k_cache, (batch, form_.kv_heads, room, form_.width), "float32")
        values = T.match_buffer(v_cache, (batch, form_.kv_heads, room, form_.width), "float32")
        real = T.match_buffer(mask, (batch, keys), "int64")
        out = T.match_buffer(y, (rows, form_.heads * form_.width), "float32")
        length = rows // batch
        _attend_all(n, Places(form_, queries, kept, values, real, out, length, keys), batch)

    return attention
