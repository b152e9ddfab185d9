"""Attention of one new token a sequence: rotation, cache and attention in one parallel region.

A task is a piece of `PIECE` keys of one key head. Lanes are channels: the product of a query with a
key is a vector of partial sums, and the sums of as many keys as a vector has lanes are folded into
one vector of scores, 3 instructions a key. The R query heads that share a key head are computed
while its keys are in the first-level cache::

    new row [H·D | G·D | G·D]          cache [B, G, C, D]
        │ norm, rotate, scale            │ piece of keys       scores [R, PIECE]
        ▼                                ▼                      │ exp2
     queries [R, D] ───────────────▶ q · k, folded ────────────▶│
     key, value ──▶ cache[P]                                    ▼
                                     v [PIECE, D] ──────────▶ sums [R, D], peak, total

Pieces are joined by their peaks and totals afterwards, on one thread: R·D numbers a piece.

Roofline: 8·T·G·D bytes of cache at the bandwidth of memory (of the second-level cache while the
cache is small).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels.activations import exp2
from llmopt.backends.tvm.kernels.attention_form import UNSEEN, Attention
from llmopt.backends.tvm.kernels.attention_places import Places
from llmopt.backends.tvm.kernels.heads import Head, Turning, lanes_for, turn
from llmopt.backends.tvm.kernels.vectors import across, at, fitting, load, pair_sums, splat, store

PIECE: Final = 128
"""Keys of a task; a multiple of every vector's lanes."""


@dataclass(frozen=True)
class Piece:
    """What a task works on.

    Args:
        io: Where everything is.
        lanes: Of a vector that divides D.
        together: Query heads whose sums stay in registers together; divides R.
        b: The sequence.
        g: The key head.
        first: The first key.
        count: How many keys.
        query: [R, D] float32, turned and scaled.
        scores: [R, PIECE] float32, scores, then weights.
    """

    io: Places
    lanes: int
    together: int
    b: Any
    g: Any
    first: Any
    count: Any
    query: Any
    scores: Any

    def product(self, r: Any, i: Any) -> Any:
        """Return the partial sums of query head r with key i of the piece."""
        key = T.min(self.first + i, self.io.keys - 1)
        place = self.io.key(self.b, self.g, key)
        total = None
        for d in range(0, self.io.form.width, self.lanes):
            term = load(self.io.k, place, d, self.lanes) * load(self.query, (r, d), 0, self.lanes)
            total = term if total is None else total + term
        return total

    def largest(self, best: Any, lane: Any) -> Any:
        """Return lane-wise the larger of what is best so far and of scores."""
        return T.max(load(best, (0,), 0, self.lanes), lane)


def together(form: Attention, features: Features, lanes: int) -> int:
    """Return how many query heads' sums fit the registers: 24 of 32, 12 of 16."""
    room = 24 if features.avx512 or features.neon else 12
    fit = max(1, room * lanes // form.width)
    return next(n for n in range(min(fit, form.ratio), 0, -1) if form.ratio % n == 0)


@T.inline
def _fold_once(acc: Any, lanes: Any, rows: Any) -> None:
    """Fold 2 * rows vectors into rows."""
    for i in T.unroll(rows):
        acc[i, at(0, lanes)] = pair_sums(
            load(acc, (2 * i, 0), 0, lanes), load(acc, (2 * i + 1, 0), 0, lanes)
        )


@T.inline
def _fold(acc: Any, lanes: Any, rows: Any) -> None:
    """Fold as many vectors as there are lanes into the first: lane i the sum of vector i."""
    if rows >= 8:
        _fold_once(acc, lanes, 8)
    if rows >= 4:
        _fold_once(acc, lanes, 4)
    if rows >= 2:
        _fold_once(acc, lanes, 2)
    if rows >= 1:
        _fold_once(acc, lanes, 1)


@T.inline
def _score(p: Any) -> None:
    """Write the scores of all query heads with the piece's keys."""
    for j in T.serial(T.ceildiv(p.count, p.lanes)):
        bias = T.alloc_buffer((p.lanes,), "float32")
        for i in T.unroll(p.lanes):
            bias[i] = p.io.bias(p.b, p.first + j * p.lanes + i)
        for r in T.serial(p.io.form.ratio):
            acc = T.alloc_buffer((p.lanes, p.lanes), "float32")
            for i in T.unroll(p.lanes):
                acc[i, at(0, p.lanes)] = p.product(r, j * p.lanes + i)
            _fold(acc, p.lanes, p.lanes // 2)
            p.scores[r, at(j * p.lanes, p.lanes)] = p.io.capped(
                load(acc, (0, 0), 0, p.lanes)
            ) + load(bias, (0,), 0, p.lanes)


@T.inline
def _weigh(p: Any, top: Any, total: Any, slot: Any) -> None:
    """Turn scores into weights; write each query head's peak and sum of weights."""
    for r in T.serial(p.io.form.ratio):
        best = T.alloc_buffer((p.lanes,), "float32")
        tally = T.alloc_buffer((p.lanes,), "float32")
        best[at(0, p.lanes)] = splat(UNSEEN, p.lanes)
        tally[at(0, p.lanes)] = splat(0.0, p.lanes)
        for j in T.serial(T.ceildiv(p.count, p.lanes)):
            best[at(0, p.lanes)] = T.max(
                load(best, (0,), 0, p.lanes), load(p.scores, (r, j * p.lanes), 0, p.lanes)
            )
        best[at(0, p.lanes)] = across(load(best, (0,), 0, p.lanes), T.max)
        for j in T.serial(T.ceildiv(p.count, p.lanes)):
            weight: T.let = exp2(
                load(p.scores, (r, j * p.lanes), 0, p.lanes) - load(best, (0,), 0, p.lanes)
            )
            p.scores[r, at(j * p.lanes, p.lanes)] = weight
            tally[at(0, p.lanes)] = load(tally, (0,), 0, p.lanes) + weight
        tally[at(0, p.lanes)] = across(load(tally, (0,), 0, p.lanes), lambda a, b: a + b)
        top[slot * p.io.form.ratio + r] = best[0]
        total[slot * p.io.form.ratio + r] = tally[0]


@T.inline
def _add_values(p: Any, sums: Any, slot: Any) -> None:
    """Write the weighted sums of values, some query heads at a time."""
    for k in T.serial(p.io.form.ratio // p.together):
        acc = T.alloc_buffer((p.together, p.io.form.width), "float32")
        for r in T.unroll(p.together):
            for d in T.unroll(p.io.form.width // p.lanes):
                acc[r, at(d * p.lanes, p.lanes)] = splat(0.0, p.lanes)
        for t in T.serial(p.count):
            for r in T.unroll(p.together):
                for d in T.unroll(p.io.form.width // p.lanes):
                    acc[r, at(d * p.lanes, p.lanes)] = load(
                        acc, (r, d * p.lanes), 0, p.lanes
                    ) + splat(p.scores[k * p.together + r, t], p.lanes) * load(
                        p.io.v, p.io.value(p.b, p.g, p.first + t), d * p.lanes, p.lanes
                    )
        for r in T.unroll(p.together):
            for d in T.unroll(p.io.form.width // p.lanes):
                sums[slot * p.io.form.ratio + k * p.together + r, at(d * p.lanes, p.lanes)] = load(
                    acc, (r, d * p.lanes), 0, p.lanes
                )


@T.inline
def _join(io: Any, lanes: Any, batch: Any, pieces: Any, sums: Any, top: Any, total: Any) -> None:
    """Join the pieces of each head: what each weighs is its total times 2**(peak - peak of all)."""
    for head in T.serial(batch * io.form.heads):
        group = head // io.form.ratio
        r = head % io.form.ratio
        best = T.alloc_buffer((1,), "float32")
        whole = T.alloc_buffer((1,), "float32")
        best[0] = T.float32(UNSEEN)
        whole[0] = T.float32(0.0)
        for i in T.serial(pieces):
            best[0] = T.max(best[0], top[(group * pieces + i) * io.form.ratio + r])
        for i in T.serial(pieces):
            row = (group * pieces + i) * io.form.ratio + r
            top[row] = exp2(top[row] - best[0])
            whole[0] = whole[0] + top[row] * total[row]
        part: T.let = T.if_then_else(
            whole[0] > T.float32(0.0), T.float32(1.0) / whole[0], T.float32(0.0)
        )
        for d in T.serial(io.form.width // lanes):
            acc = T.alloc_buffer((lanes,), "float32")
            acc[at(0, lanes)] = splat(0.0, lanes)
            for i in T.serial(pieces):
                row = (group * pieces + i) * io.form.ratio + r
                acc[at(0, lanes)] = load(acc, (0,), 0, lanes) + load(
                    sums, (row, d * lanes), 0, lanes
                ) * splat(top[row] * part, lanes)
            store(
                (io.y, (head // io.form.heads, head % io.form.heads * io.form.width)),
                d * lanes,
                load(acc, (0,), 0, lanes),
            )


@T.inline
def _attend(p: Any, sums: Any, top: Any, total: Any, slot: Any) -> None:
    """Compute one piece, its queries turned already."""
    _score(p)
    _weigh(p, top, total, slot)
    _add_values(p, sums, slot)


@dataclass(frozen=True)
class Fresh:
    """The new row of a sequence: where its heads are, and what to do with them.

    Args:
        form: The attention.
        turning: Norm and rotation.
        lanes: Of a vector that divides what is rotated.
        qkv: [M, H·D + 2·G·D].
        norms: [D] for queries, [D] for keys.
        tables: cos, sin [positions, rotary / 2].
        position_ids: [B, S] int64.
        length: S.
    """

    form: Attention
    turning: Turning
    lanes: int
    qkv: Any
    norms: tuple[Any, Any]
    tables: tuple[Any, Any]
    position_ids: Any
    length: Any

    def query(self, row: Any, h: Any, target: tuple[Any, tuple[Any, ...]], scale: float) -> Head:
        """Return query head h of a row, to be written to ``target``."""
        return self._head(row, h, target, (self.norms[0], scale))

    def key(self, row: Any, g: Any, target: tuple[Any, tuple[Any, ...]]) -> Head:
        """Return key head g of a row."""
        return self._head(row, self.form.heads + g, target, (self.norms[1], 1.0))

    def value(self, row: Any, g: Any, d: Any) -> Any:
        """Return numbers from d on of value head g of a row."""
        column = (self.form.heads + self.form.kv_heads + g) * self.form.width
        return load(self.qkv, (row, column), d, self.lanes)

    def _head(
        self,
        row: Any,
        h: Any,
        target: tuple[Any, tuple[Any, ...]],
        how: tuple[Any, float],
    ) -> Head:
        position = T.int64(0)
        if self.turning.rotary:
            position = self.position_ids[row // self.length, row % self.length]
        source = (self.qkv, (row, h * self.form.width))
        tables = (*self.tables, position)
        return Head(self.turning, self.lanes, source, target, tables, *how)


@T.inline
def append_row(new: Any, row: Any, g: Any, k: Any, v: Any) -> None:
    """Write key (turned) and value of a row's head g to places in the caches."""
    turn(new.key(row, g, k))
    for d in T.serial(new.form.width // new.lanes):
        store(v, d * new.lanes, new.value(row, g, d * new.lanes))


def fused(form: Attention, turning: Turning, features: Features) -> Any:
    """Return the function (qkv, q_norm, …, position_ids, mask, k_cache, v_cache, y)."""
    lanes, turned = fitting(features, form.width), lanes_for(turning, features)
    width, ratio, group = form.width, form.ratio, form.kv_heads
    fit, half = together(form, features, lanes), max(turning.rotary // 2, 1)

    @T.prim_func(s_tir=True)
    def attention(
        qkv: T.handle,
        q_norm: T.handle,
        k_norm: T.handle,
        cos: T.handle,
        sin: T.handle,
        position_ids: T.handle,
        mask: T.handle,
        k_cache: T.handle,
        v_cache: T.handle,
        y: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        batch, keys, room, angles = T.int64(), T.int64(), T.int64(), T.int64()
        parts = T.match_buffer(qkv, (batch, (ratio * group + 2 * group) * width), "float32")
        q_weight = T.match_buffer(q_norm, (width,), "float32")
        k_weight = T.match_buffer(k_norm, (width,), "float32")
        cosines = T.match_buffer(cos, (angles, half), "float32")
        sines = T.match_buffer(sin, (angles, half), "float32")
        positions = T.match_buffer(position_ids, (batch, T.int64(1)), "int64")
        real = T.match_buffer(mask, (batch, keys), "int64")
        kept = T.match_buffer(k_cache, (batch, group, room, width), "float32")
        values = T.match_buffer(v_cache, (batch, group, room, width), "float32")
        out = T.match_buffer(y, (batch, ratio * group * width), "float32")
        io = T.meta_var(Places(form, parts, kept, values, real, out, T.int64(1), keys))
        new = T.meta_var(
            Fresh(
                form,
                turning,
                turned,
                parts,
                (q_weight, k_weight),
                (cosines, sines),
                positions,
                T.int64(1),
            )
        )
        begin = io.begin(0)
        pieces = T.ceildiv(keys - begin, PIECE)
        room_for = T.meta_var(batch * group * ratio * T.ceildiv(keys, PIECE))
        sums = T.alloc_buffer((room_for, width), "float32")
        top = T.alloc_buffer((room_for,), "float32")
        total = T.alloc_buffer((room_for,), "float32")
        for task in T.parallel(batch * group * pieces):
            query = T.alloc_buffer((ratio, width), "float32")
            scores = T.alloc_buffer((ratio, PIECE), "float32")
            b = task // (group * pieces)
            g = task // pieces % group
            i = task % pieces
            for r in T.serial(ratio):
                turn(new.query(b, g * ratio + r, (query, (r, 0)), form.factor))
            if i == pieces - 1:
                append_row(new, b, g, (kept, (b, g, keys - 1, 0)), (values, (b, g, keys - 1, 0)))
            first = begin + i * PIECE
            _attend(
                Piece(io, lanes, fit, b, g, first, T.min(keys - first, PIECE), query, scores),
                sums,
                top,
                total,
                task,
            )
        _join(io, lanes, batch, pieces, sums, top, total)

    return attention
