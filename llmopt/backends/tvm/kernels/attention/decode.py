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
from llmopt.backends.tvm.kernels.attention.addresses import Addresses
from llmopt.backends.tvm.kernels.attention.form import UNSEEN, AttentionForm
from llmopt.backends.tvm.kernels.attention.rows import Fresh, append_row
from llmopt.backends.tvm.kernels.heads import rotate
from llmopt.backends.tvm.kernels.vectors import (
    Registers,
    across,
    load,
    pair_sums,
    splat,
    store,
    variable,
)

PIECE: Final = 128
"""Keys of a task; a multiple of every vector's lanes."""


@dataclass(frozen=True)
class HeadTask:
    """What a task works on.

    Args:
        io: Addresses of all buffers.
        lanes: Lanes of a vector that divides D.
        together: Query heads whose sums stay in registers together; divides R.
        b: The sequence.
        g: The key head.
        first: The first key.
        count: Number of keys.
        query: [R, D] float32, turned and scaled.
        scores: [R, PIECE] float32, scores, then weights.
    """

    io: Addresses
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


def together(form: AttentionForm, features: Features, lanes: int) -> int:
    """Return how many query heads' sums fit the registers: 24 of 32, 12 of 16."""
    room = 24 if features.avx512 or features.neon else 12
    fit = max(1, room * lanes // form.width)
    return next(n for n in range(min(fit, form.ratio), 0, -1) if form.ratio % n == 0)


@dataclass(frozen=True)
class Results:
    """What pieces leave for `_join`, one row a piece and query head, those of a piece together.

    Args:
        sums: [rows, D] float32, weighted values.
        top: [rows] float32, the largest score.
        total: [rows] float32, sum of the weights.
    """

    sums: Any
    top: Any
    total: Any

    @classmethod
    def allocated(cls, rows: Any, width: int) -> Results:
        """Return the buffers, allocated where the text is being read."""
        return cls(
            *[T.alloc_buffer(shape, "float32") for shape in ((rows, width), (rows,), (rows,))]
        )


def _score(p: HeadTask) -> None:
    """Write the scores of all query heads with the piece's keys."""
    with T.serial(T.ceildiv(p.count, p.lanes)) as j:
        bias = T.alloc_buffer((p.lanes,), "float32")
        for i in range(p.lanes):
            T.buffer_store(bias, p.io.bias(p.b, p.first + j * p.lanes + i), [i])
        with T.serial(p.io.form.ratio) as r:
            acc = [T.bind(p.product(r, j * p.lanes + i)) for i in range(p.lanes)]
            while len(acc) > 1:
                acc = [T.bind(pair_sums(*acc[i : i + 2])) for i in range(0, len(acc), 2)]
            score = p.io.capped(acc[0]) + load(bias, (0,), 0, p.lanes)
            store((p.scores, (r, 0)), j * p.lanes, score)


def _weigh(p: HeadTask, results: Results, row: Any) -> None:
    """Turn scores into weights; write each query head's peak and sum of weights."""
    with T.serial(p.io.form.ratio) as r:
        state = Registers.allocated(2, 1, p.lanes)
        state.fill(lambda row, _column: splat((UNSEEN, 0.0)[row], p.lanes))
        vectors = T.ceildiv(p.count, p.lanes)
        with T.serial(vectors) as j:
            scores = load(p.scores, (r, 0), j * p.lanes, p.lanes)
            state.put(0, 0, T.max(state.get(0, 0), scores))
        state.put(0, 0, across(state.get(0, 0), T.max))
        with T.serial(vectors) as j:
            scores = load(p.scores, (r, 0), j * p.lanes, p.lanes)
            weight = T.bind(exp2(scores - state.get(0, 0)))
            store((p.scores, (r, 0)), j * p.lanes, weight)
            state.put(1, 0, state.get(1, 0) + weight)
        state.put(1, 0, across(state.get(1, 0), lambda a, b: a + b))
        T.buffer_store(results.top, state.vectors[0][0][0], [row + r])
        T.buffer_store(results.total, state.vectors[1][0][0], [row + r])


def _add_values(p: HeadTask, results: Results, row: Any) -> None:
    """Write the weighted sums of values, some query heads at a time."""
    columns = p.io.form.width // p.lanes
    with T.serial(p.io.form.ratio // p.together) as k:
        acc = Registers.allocated(p.together, columns, p.lanes)
        acc.clear()
        with T.serial(p.count) as t:
            place = p.io.value(p.b, p.g, p.first + t)
            heads = [p.scores[k * p.together + r, t] for r in range(p.together)]
            acc.add_products(
                [splat(weight, p.lanes) for weight in heads],
                [load(p.io.v, place, c * p.lanes, p.lanes) for c in range(columns)],
            )
        for r in range(p.together):
            for c in range(columns):
                target = (results.sums, (row + k * p.together + r, 0))
                store(target, c * p.lanes, acc.get(r, c))


@dataclass(frozen=True)
class Joined:
    """All pieces, to be joined.

    Args:
        io: Addresses of all buffers.
        lanes: Lanes of a vector that divides D.
        batch: B.
        pieces: Number of pieces of a key head.
        results: Partial results of the pieces.
    """

    io: Addresses
    lanes: int
    batch: Any
    pieces: Any
    results: Results

    def row(self, head: Any) -> Any:
        """Return where a query head's first piece is."""
        ratio = self.io.form.ratio
        return head // ratio * self.pieces * ratio + head % ratio

    def piece(self, first: Any, i: Any) -> Any:
        """Return where a query head's piece i is."""
        return first + i * self.io.form.ratio


def _join(p: Joined) -> None:
    """Join the pieces of each head: what each weighs is its total times 2**(peak - peak of all)."""
    with T.serial(p.batch * p.io.form.heads) as head:
        first = variable(p.row(head))
        best, whole = Registers.allocated(1, 1, 1), Registers.allocated(1, 1, 1)
        best.put(0, 0, T.float32(UNSEEN))
        whole.clear()
        with T.serial(p.pieces) as i:
            best.put(0, 0, T.max(best.get(0, 0), p.results.top[p.piece(first, i)]))
        with T.serial(p.pieces) as i:
            row = variable(p.piece(first, i))
            share = T.bind(exp2(p.results.top[row] - best.get(0, 0)))
            T.buffer_store(p.results.top, share, [row])
            whole.put(0, 0, whole.get(0, 0) + share * p.results.total[row])
        _write(p, head, first, whole.get(0, 0))


def _write(p: Joined, head: Any, first: Any, total: Any) -> None:
    """Write a head's result: its pieces' sums by their shares, divided by the whole."""
    heads, width = p.io.form.heads, p.io.form.width
    part = variable(T.if_then_else(total > T.float32(0.0), T.float32(1.0) / total, T.float32(0.0)))
    with T.serial(width // p.lanes) as d:
        acc = Registers.allocated(1, 1, p.lanes)
        acc.clear()
        with T.serial(p.pieces) as i:
            row = variable(p.piece(first, i))
            share = splat(p.results.top[row] * part, p.lanes)
            sums = load(p.results.sums, (row, 0), d * p.lanes, p.lanes)
            acc.put(0, 0, acc.get(0, 0) + sums * share)
        place = (head // heads, head % heads * width)
        store((p.io.y, place), d * p.lanes, acc.get(0, 0))


def attend(io: Addresses, new: Fresh, features: Features, batch: Any) -> None:
    """Compute all pieces and join them; the last one of a key head appends the new key."""
    form = io.form
    lanes = new.lanes  # of stores: wider loads of queries in registers are miscompiled by LLVM 22
    group, ratio = form.kv_heads, form.ratio
    begin = variable(io.begin(0))
    pieces = variable(T.ceildiv(io.keys - begin, PIECE))
    most = batch * group * ratio * T.ceildiv(io.keys, PIECE)
    results = Results.allocated(most, form.width)
    with T.parallel(batch * group * pieces) as task:
        i, head = variable(task % pieces), variable(task // pieces)
        b, g = variable(head // group), variable(head % group)
        query = T.alloc_buffer((ratio, form.width), "float32")
        scores = T.alloc_buffer((ratio, PIECE), "float32")
        with T.serial(ratio) as r:
            rotate(new.query(b, g * ratio + r, (query, (r, 0)), form.factor))
        with T.If(i == pieces - 1), T.Then():
            append_row(new, b, g, (io.k, io.v), (b, g, io.keys - 1, 0))
        first = variable(begin + i * PIECE)
        count = variable(T.min(io.keys - first, PIECE))
        fit = together(form, features, lanes)
        piece = HeadTask(io, lanes, fit, b, g, first, count, query, scores)
        _score(piece)
        _weigh(piece, results, task * ratio)
        _add_values(piece, results, task * ratio)
    _join(Joined(io, lanes, batch, pieces, results))
