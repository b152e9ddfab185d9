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

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels.activations import exp2
from llmopt.backends.tvm.kernels.attention_form import UNSEEN, Attention
from llmopt.backends.tvm.kernels.attention_places import Places
from llmopt.backends.tvm.kernels.vectors import at, load, splat


@dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks.

    Args:
        lanes: Of a vector.
        vectors: Vectors of rows in a block.
        tile: Keys that stay in registers together.
        deep: Channels that do: the most up to ``tile`` that divide the width of a head.
        keys: Keys in a block; a multiple of ``tile``.
    """

    lanes: int
    vectors: int
    tile: int
    deep: int
    keys: int = 64

    @property
    def rows(self) -> int:
        """N, rows in a block."""
        return self.lanes * self.vectors

    @classmethod
    def of(cls, form: Attention, features: Features) -> Blocks:
        """Return sizes that fit the registers: 32 of them with AVX-512 and NEON, else 16."""
        vectors, tile = (2, 8) if features.avx512 else (3, 8) if features.neon else (3, 4)
        deep = next(n for n in range(tile, 0, -1) if form.width % n == 0)
        return cls(features.lanes, vectors, tile, deep)


@dataclass(frozen=True)
class Block:
    """What a task keeps in the first-level cache.

    Args:
        turned: [D, N] float32, queries times the scale.
        scores: [keys, N] float32, scores, then weights.
        summed: [D, N] float32, weighted values so far.
        position: [N] int32, of each row among the keys.
        peak: [N] float32, the largest score of the blocks before.
        fresh: [N] float32, the same with this block.
        shrink: [N] float32, what sums of the blocks before are multiplied by.
        total: [N] float32, sum of the weights so far.
    """

    turned: Any
    scores: Any
    summed: Any
    position: Any
    peak: Any
    fresh: Any
    shrink: Any
    total: Any

    @classmethod
    def allocated(cls, n: Blocks, width: int) -> Block:
        """Return the buffers, allocated where the text is being read."""
        shapes = [(width, n.rows), (n.keys, n.rows), (width, n.rows), *[(n.rows,)] * 5]
        dtypes = ["float32"] * 3 + ["int32"] + ["float32"] * 4
        pairs = zip(shapes, dtypes, strict=True)
        return cls(*[T.alloc_buffer(shape, dtype, scope="local") for shape, dtype in pairs])


@dataclass(frozen=True)
class Task:
    """Which block: rows from ``row`` on of key head ``g`` of sequence ``b``."""

    b: Any
    g: Any
    row: Any


@T.inline
def _start(n: Any, io: Any, task: Any, own: Any) -> None:
    """Turn the block's queries, scaled; rows past the end repeat the last row."""
    for i in T.serial(n.rows):
        row = T.min(task.row + i, io.length * io.form.ratio - 1)
        own.position[i] = T.cast(io.past + row // io.form.ratio, "int32")
        own.peak[i] = T.float32(UNSEEN)
        own.total[i] = T.float32(0.0)
        for d in T.serial(io.form.width):
            own.turned[d, i] = load(io.q, io.row(task.b, row, task.g), d) * T.float32(
                io.form.factor
            )
            own.summed[d, i] = T.float32(0.0)


@T.inline
def _multiply_keys(n: Any, io: Any, task: Any, own: Any, acc: Any, key: Any) -> None:
    """Multiply a tile of keys with all rows."""
    for r in T.unroll(n.tile):
        for c in T.unroll(n.vectors):
            acc[r, at(c * n.lanes, n.lanes)] = splat(0.0, n.lanes)
    for d in T.serial(io.form.width):
        for r in T.unroll(n.tile):
            for c in T.unroll(n.vectors):
                acc[r, at(c * n.lanes, n.lanes)] = load(acc, (r, c * n.lanes), 0, n.lanes) + splat(
                    load(io.k, io.key(task.b, task.g, key(r)), d), n.lanes
                ) * load(own.turned, (d, c * n.lanes), 0, n.lanes)


@T.inline
def _keep_scores(n: Any, io: Any, task: Any, own: Any, acc: Any, origin: Any, first: Any) -> None:
    """Write a tile's scores, hidden where a row does not see the key; raise the rows' maxima."""
    for r in T.unroll(n.tile):
        bias: T.let = io.bias(task.b, origin + first + r)
        for c in T.unroll(n.vectors):
            score: T.let = io.windowed(
                io.capped(load(acc, (r, c * n.lanes), 0, n.lanes)) + splat(bias, n.lanes),
                origin + first + r,
                load(own.position, (c * n.lanes,), 0, n.lanes),
            )
            own.scores[first + r, at(c * n.lanes, n.lanes)] = score
            own.fresh[at(c * n.lanes, n.lanes)] = T.max(
                load(own.fresh, (c * n.lanes,), 0, n.lanes), score
            )


@T.inline
def _score(n: Any, io: Any, task: Any, own: Any, origin: Any, count: Any) -> None:
    """Multiply a block of keys with all rows, tile by tile."""
    for c in T.unroll(n.vectors):
        own.fresh[at(c * n.lanes, n.lanes)] = load(own.peak, (c * n.lanes,), 0, n.lanes)
    for j in T.serial(T.ceildiv(count, n.tile)):
        acc = T.alloc_buffer((n.tile, n.rows), "float32", scope="local")
        first = j * n.tile
        if origin + first + n.tile <= io.keys:
            _multiply_keys(n, io, task, own, acc, lambda r: origin + first + r)
        else:
            _multiply_keys(n, io, task, own, acc, lambda r: T.min(origin + first + r, io.keys - 1))
        _keep_scores(n, io, task, own, acc, origin, first)


@T.inline
def _weigh(n: Any, own: Any, count: Any) -> None:
    """Turn a block's scores into weights; keep their sums and what older sums shrink by."""
    for c in T.unroll(n.vectors):
        fresh: T.let = load(own.fresh, (c * n.lanes,), 0, n.lanes)
        shrink: T.let = exp2(load(own.peak, (c * n.lanes,), 0, n.lanes) - fresh)
        total = T.alloc_buffer((n.lanes,), "float32", scope="local")
        total[at(0, n.lanes)] = load(own.total, (c * n.lanes,), 0, n.lanes) * shrink
        for t in T.serial(T.ceildiv(count, n.tile) * n.tile):
            weight: T.let = exp2(load(own.scores, (t, c * n.lanes), 0, n.lanes) - fresh)
            own.scores[t, at(c * n.lanes, n.lanes)] = weight
            total[at(0, n.lanes)] = load(total, (0,), 0, n.lanes) + weight
        own.peak[at(c * n.lanes, n.lanes)] = fresh
        own.shrink[at(c * n.lanes, n.lanes)] = shrink
        own.total[at(c * n.lanes, n.lanes)] = load(total, (0,), 0, n.lanes)


@T.inline
def _add_values(n: Any, io: Any, task: Any, own: Any, origin: Any, count: Any) -> None:
    """Add a block's values, weighted, to what older blocks left."""
    for j in T.serial(io.form.width // n.deep):
        acc = T.alloc_buffer((n.deep, n.rows), "float32", scope="local")
        for r in T.unroll(n.deep):
            for c in T.unroll(n.vectors):
                acc[r, at(c * n.lanes, n.lanes)] = load(
                    own.summed, (j * n.deep + r, c * n.lanes), 0, n.lanes
                ) * load(own.shrink, (c * n.lanes,), 0, n.lanes)
        for t in T.serial(count):
            for r in T.unroll(n.deep):
                for c in T.unroll(n.vectors):
                    acc[r, at(c * n.lanes, n.lanes)] = load(
                        acc, (r, c * n.lanes), 0, n.lanes
                    ) + splat(
                        load(io.v, io.value(task.b, task.g, origin + t), j * n.deep + r), n.lanes
                    ) * load(own.scores, (t, c * n.lanes), 0, n.lanes)
        for r in T.unroll(n.deep):
            for c in T.unroll(n.vectors):
                own.summed[j * n.deep + r, at(c * n.lanes, n.lanes)] = load(
                    acc, (r, c * n.lanes), 0, n.lanes
                )


@T.inline
def _finish(n: Any, io: Any, task: Any, own: Any) -> None:
    """Divide by the sums of weights and turn back; rows that saw nothing are 0."""
    for i in T.serial(n.rows):
        if task.row + i < io.length * io.form.ratio:
            part: T.let = T.if_then_else(
                own.total[i] > T.float32(0.0), T.float32(1.0) / own.total[i], T.float32(0.0)
            )
            for d in T.serial(io.form.width):
                place = T.meta_var(io.row(task.b, task.row + i, task.g))
                io.y[place[0], place[1] + d] = own.summed[d, i] * part


@T.inline
def _attend(n: Any, io: Any, task: Any, own: Any) -> None:
    """Compute one block of rows."""
    _start(n, io, task, own)
    begin = io.begin(task.row)
    end = io.end(task.row + n.rows - 1)
    for j in T.serial(T.ceildiv(end - begin, n.keys)):
        origin = begin + j * n.keys
        count = T.min(end - origin, n.keys)
        _score(n, io, task, own, origin, count)
        _weigh(n, own, count)
        _add_values(n, io, task, own, origin, count)
    _finish(n, io, task, own)


@T.inline
def _attend_all(n: Any, io: Any, batch: Any) -> None:
    """Compute all blocks; early and late ones alternate, since late ones see more keys."""
    blocks = T.ceildiv(io.length * io.form.ratio, n.rows)
    for task in T.parallel(batch * io.form.kv_heads * blocks):
        step = task % blocks
        block = T.if_then_else(step % 2 == 0, step // 2, blocks - 1 - step // 2)
        head = task // blocks
        _attend(
            n,
            io,
            Task(head // io.form.kv_heads, head % io.form.kv_heads, block * n.rows),
            Block.allocated(n, io.form.width),
        )


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
