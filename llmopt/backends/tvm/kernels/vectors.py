"""The words that kernels of rows and of attention are written in: vectors of float32.

A kernel is a function in TVMScript that says what it reads and writes; what it does is said by
plain Python functions that it calls, which run once and emit statements: a Python loop is unrolled
code, ``with T.serial(n) as i`` is a loop of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.features import Features


def fitting(features: Features, width: int) -> int:
    """Return the most lanes that a vector has and that divide ``width``.

    >>> fitting(Features(avx512=True), 24)
    8
    """
    lanes = features.lanes
    while width % lanes:
        lanes //= 2
    return lanes


def load(buffer: Any, index: tuple[Any, ...], offset: Any = 0, lanes: int = 1) -> Any:
    """Return ``lanes`` numbers of a buffer along its last axis, ``offset`` after ``index``."""
    dtype = str(buffer.ty.dtype)
    first = [*index[:-1], index[-1] + offset]
    return buffer.vload(first, dtype=f"{dtype}x{lanes}" if lanes > 1 else dtype)


def at(start: Any, lanes: int) -> Any:
    """Return the index of a store of ``lanes`` numbers."""
    return T.ramp(start, 1, lanes) if lanes > 1 else start


def splat(number: Any, lanes: int) -> Any:
    """Return a vector that has the number in every lane."""
    value = T.float32(number) if isinstance(number, int | float) else number
    return T.broadcast(value, lanes) if lanes > 1 else value


def variable(value: Any) -> Any:
    """Return a number that is computed here, once.

    It is kept in memory, which LLVM turns into a register. A name bound to an expression TVM would
    write out wherever it is used: divisions by a symbol then take it minutes.
    """
    memory = T.alloc_buffer((1,), str(value.ty.dtype))
    T.buffer_store(memory, value, [0])
    return memory[0]


def lanes_of(value: Any) -> int:
    """Return how many lanes an expression has."""
    return int(value.ty.dtype.lanes)


def shuffled(first: Any, second: Any, lanes: list[int]) -> Any:
    """Return lanes chosen from two vectors, counted through the first, then the second."""
    return tirx.Shuffle([first, second], lanes)


def pair_sums(first: Any, second: Any) -> Any:
    """Return the sums of neighbours: those of the first vector, then those of the second.

    Of L vectors, folded pairwise log2(L) times, remains one whose lane i is the sum of vector i:
    2 shuffles and 1 addition for each fold, so about 3 operations a vector.
    """
    lanes = lanes_of(first)
    even = shuffled(first, second, list(range(0, 2 * lanes, 2)))
    odd = shuffled(first, second, list(range(1, 2 * lanes, 2)))
    return even + odd


def transposed(vectors: Sequence[Any]) -> list[Any]:
    """Return as many vectors as each has lanes, row and lane exchanged.

    log2(L) rounds of L shuffles; each exchanges blocks twice as wide as the one before.
    """
    rows, step = [T.bind(vector) for vector in vectors], 1
    lanes = len(rows)
    while step < lanes:
        upper = [lane if not lane & step else lanes + lane - step for lane in range(lanes)]
        lower = [lane + step if not lane & step else lanes + lane for lane in range(lanes)]
        after = list(rows)
        for i in (i for i in range(lanes) if not i & step):
            after[i] = T.bind(shuffled(rows[i], rows[i + step], upper))
            after[i + step] = T.bind(shuffled(rows[i], rows[i + step], lower))
        rows, step = after, 2 * step
    return rows


def across(value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Return a vector that holds all lanes of ``value`` combined, in every lane."""
    lanes = lanes_of(value)
    step = lanes // 2
    while step:
        value = T.bind(value)
        turned = tirx.Shuffle([value], [lane ^ step for lane in range(lanes)])
        value, step = combine(value, turned), step // 2
    return value


@dataclass(frozen=True)
class Registers:
    """Rows x columns of vectors that stay in registers.

    Each is a buffer of its own, because TVM moves what is larger than a kilobyte to its heap.
    """

    vectors: tuple[tuple[Any, ...], ...]
    lanes: int

    @classmethod
    def allocated(cls, rows: int, columns: int, lanes: int) -> Registers:
        """Return registers, allocated where the text is being read."""
        return cls(
            tuple(tuple(_register(lanes) for _ in range(columns)) for _ in range(rows)), lanes
        )

    def get(self, row: int, column: int) -> Any:
        """Return a vector."""
        return load(self.vectors[row][column], (0,), 0, self.lanes)

    def put(self, row: int, column: int, value: Any) -> None:
        """Write a vector."""
        store((self.vectors[row][column], (0,)), 0, value)

    def fill(self, value: Callable[[int, int], Any]) -> None:
        """Write ``value(row, column)`` to all of them."""
        for row, vectors in enumerate(self.vectors):
            for column in range(len(vectors)):
                self.put(row, column, value(row, column))

    def clear(self) -> None:
        """Write 0 to all of them."""
        zero = splat(0.0, self.lanes)
        self.fill(lambda _row, _column: zero)

    def add_products(
        self,
        rows: Sequence[Any],
        columns: Sequence[Any],
        multiplied: Callable[[Any, Any, Any], Any] = lambda a, b, total: total + a * b,
    ) -> None:
        """Add to each the product of its row's and its column's vector, bound here once."""
        bound = [T.bind(value) for value in columns]
        for row, value in enumerate(rows):
            factor = T.bind(value)
            for column, other in enumerate(bound):
                self.put(row, column, multiplied(factor, other, self.get(row, column)))


def _register(lanes: int) -> Any:
    return T.alloc_buffer((lanes,), "float32")


def store(target: tuple[Any, tuple[Any, ...]], offset: Any, value: Any) -> None:
    """Write a vector to a buffer along its last axis, ``offset`` after a place in it."""
    buffer, place = target
    T.buffer_store(buffer, value, [*place[:-1], at(place[-1] + offset, lanes_of(value))])
