"""The products of blocked attention on AMX's tiles of bfloat16.

What `attention_prefill` keeps is what tiles take: lanes are rows of queries, elements are pairs::

    scores [keys, N]  =  K [keys, D]      times  Qᵀ [D/2 pairs, N]      rows of K as they lie
    sums   [D, N]    +=  Vᵀ [D, keys/2]   times  P  [keys/2 pairs, N]   V turned as it is copied

Both go 32 x 32 results at a time, 32 channels or 32 keys deep.

Roofline: 64 x 64 scores of 64 channels take 1,000 cycles of tiles, both products together; their
softmax takes some 2,500 of vectors, so exponentials are what bounds it.
"""

from __future__ import annotations

from typing import Any, Final

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.kernels.amx import HIGH, Tiles, four_products
from llmopt.backends.tvm.kernels.vectors import (
    Registers,
    load,
    splat,
    store,
    transposed,
    variable,
)

STEP: Final = 32
"""Keys, channels and rows that are multiplied together."""
_PAIRS: Final = STEP // 2


def score(w: Any, unit: Tiles, origin: Any, count: Any) -> None:
    """Multiply a block of keys with all rows; hide what a row does not see; raise the maxima.

    Args:
        w: The block (`attention_prefill.Work`).
        unit: The processor's tiles.
        origin: The block's first key.
        count: Number of keys, a multiple of `STEP`.
    """
    half, rows = w.io.form.width // 2, w.n.rows
    with T.serial(count // STEP) as j, T.serial(rows // STEP) as c:
        for tile in range(4):
            unit.zero(tile)
        with T.serial(half // _PAIRS) as d:
            for at in (0, 1):
                key = (j * STEP + at * HIGH) * half + d * _PAIRS
                unit.load(4 + at, w.resident, (key,), 4 * half)
                unit.load(6 + at, w.transposed, (d * _PAIRS, c * STEP + at * HIGH), 4 * rows)
            four_products(unit, halves=True)
        for tile in range(4):
            place = (j * STEP + tile // 2 * HIGH, c * STEP + tile % 2 * HIGH)
            unit.store(tile, w.scores, place, 4 * rows)
    _hide(w, origin, count)


def _hide(w: Any, origin: Any, count: Any) -> None:
    """Write scores as they are seen, and the largest of each row."""
    best = Registers.allocated(1, w.n.vectors, w.n.lanes)
    for c in range(w.n.vectors):
        best.put(0, c, w.vector(w.peak, c))
    positions = [T.bind(vector) for vector in w.vectors(w.position)]
    with T.serial(count) as t:
        bias = T.bind(w.io.bias(w.b, origin + t))
        for c, position in enumerate(positions):
            found = w.io.capped(w.vector(w.scores, t, c)) + splat(bias, w.n.lanes)
            seen = T.bind(w.io.windowed(found, origin + t, position))
            w.put(w.scores, (t, c), seen)
            best.put(0, c, T.max(best.get(0, c), seen))
    for c in range(w.n.vectors):
        w.put(w.fresh, (c,), best.get(0, c))


def hold_values(w: Any, origin: Any, count: Any) -> None:
    """Copy a block's values, channels exchanged with pairs of keys: [D, keys/2]."""
    per_row = w.n.keys // 2
    with T.serial(count // STEP) as j, T.serial(w.io.form.width // HIGH) as d:
        packed = []
        for pair in range(_PAIRS):
            keys = (origin + j * STEP + 2 * pair + i for i in (0, 1))
            places = [w.io.value(w.b, w.g, variable(T.min(key, w.io.keys - 1))) for key in keys]
            vectors = [load(w.io.v, place, d * HIGH, HIGH) for place in places]
            packed.append(w.n.numbers.packed(vectors))
        for channel, vector in enumerate(transposed(packed)):
            line = (d * HIGH + channel) * per_row + j * _PAIRS
            store((w.resident, (line,)), 0, vector)


def add_values(w: Any, unit: Tiles, count: Any) -> None:
    """Add a block's values, weighted, to what older blocks left."""
    _shrink(w)
    rows, per_row = w.n.rows, w.n.keys // 2
    with T.serial(w.io.form.width // STEP) as d, T.serial(rows // STEP) as c:
        places = [(d * STEP + at // 2 * HIGH, c * STEP + at % 2 * HIGH) for at in range(4)]
        for tile, place in enumerate(places):
            unit.load(tile, w.summed, place, 4 * rows)
        with T.serial(count // STEP) as t:
            for at in (0, 1):
                line = (d * STEP + at * HIGH) * per_row + t * _PAIRS
                unit.load(4 + at, w.resident, (line,), 4 * per_row)
                unit.load(6 + at, w.weights, (t * _PAIRS, c * STEP + at * HIGH), 4 * rows)
            four_products(unit, halves=True)
        for tile, place in enumerate(places):
            unit.store(tile, w.summed, place, 4 * rows)


def _shrink(w: Any) -> None:
    """Shrink the sums, if any row's maximum has grown."""
    factors = [T.bind(vector) for vector in w.vectors(w.shrink)]
    least = factors[0]
    for factor in factors[1:]:
        least = T.min(least, factor)
    name = f"llvm.vector.reduce.fmin.v{w.n.lanes}f32"
    smallest = T.bind(T.call_llvm_pure_intrin("float32", name, least))
    with T.If(smallest < T.float32(1.0)), T.Then(), T.serial(w.io.form.width) as d:
        for c, factor in enumerate(factors):
            w.put(w.summed, (d, c), w.vector(w.summed, d, c) * factor)
