"""What values of positions alone have to keep, shown by evaluating them.

A row that was computed when the sequence was short must be what it is in a longer one, because
its keys and values were cached then. That is evaluated at two lengths, as
``docs/decisions/0002`` does for masks: the parts that are looked at read no layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llmopt.interface.arrays import Array
from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir.probe import Probe
from llmopt.ir.program import Program
from llmopt.passes.fuse_attention import FORBIDDEN
from llmopt.passes.incremental.flow import refuse
from llmopt.passes.masks import lengths

_SHORT: Final = 9
_LONGEST_SQUARE: Final = 1100  # a mask of more queries takes too long to evaluate
_BATCH: Final = 3
_REAL: Final = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_CLOSE: Final = 1e-6  # relative: rounding of angles and biases


class Proofs:
    """Evaluates values of a Program that depend on no token.

    Args:
        program: Program whose values are evaluated.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._mask = program.input(Role.MASK)
        self._varying: set[ir.Value] = set()
        self._steady: set[tuple[ir.Value, int | None, int | None, bool]] = set()
        for node in program.graph:
            if any(self._reads(node, value) for value in node.inputs if value is not None):
                self._varying.update(node.outputs)

    def varies(self, value: ir.Value) -> bool:
        """Whether ``value`` depends on how many tokens there are, or which are padding."""
        return value in self._varying or value is self._mask

    def _reads(self, node: ir.Node, value: ir.Value) -> bool:
        if node.op_type in ("Shape", "Size"):
            dims = g.shape(value) or ["?"]
            start, end = g.attribute(node, "start", 0), g.attribute(node, "end", len(dims))
            return any(not isinstance(dim, int) and dim != "B" for dim in dims[start:end])
        return self.varies(value)

    def steady(
        self,
        node: ir.Node,
        value: ir.Value,
        rows: int | None,
        keys: int | None,
        *,
        shifts: bool = False,
    ) -> None:
        """Show that ``value`` begins as it does for a shorter sequence.

        Args:
            node: Reader of the value, for the refusal.
            value: Value to evaluate.
            rows: Axis of queries, if the value has one.
            keys: Axis of keys, if the value has one; keys after the query do not count.
            shifts: Whether a number may be added to a whole row: a softmax does not see it.

        Raises:
            NotIncrementalError: it does not, or that cannot be proven.
        """
        if (value, rows, keys, shifts) in self._steady:
            return
        for short, long in self._pairs(value, square=rows is not None and keys is not None):
            for mask in self._masks(long):
                before = self._evaluate(node, value, mask[:, :short])
                after = self._evaluate(node, value, mask)
                for axis in (rows, keys):
                    if axis is not None:
                        after = np.take(after, range(short), axis)
                if not _same(*_lined_up(before, after, rows, keys), shifts=shifts):
                    what = f"reads {value.name!r}, which is another one in a longer sequence"
                    raise refuse(node, f"{what} ({long} tokens, not {short})")
        self._steady.add((value, rows, keys, shifts))

    def sliding(self, node: ir.Node, value: ir.Value, axes: tuple[int | None, int | None]) -> bool:
        """Whether what ``value`` says of a query and a key depends on how far apart they are alone.

        A number added to a whole row does not count: a softmax does not see it.

        Args:
            node: Reader of the value, for the refusal.
            value: A mask or bias.
            axes: Axes of queries, if the value has one, and of keys.

        Raises:
            NotIncrementalError: it cannot be evaluated.
        """
        rows, keys = axes
        if keys is None:
            return True
        for _, length in self._pairs(value, square=rows is not None):
            whole = self._evaluate(node, value, np.ones((_BATCH, length), np.int64))
            here, there = range(length - 1), range(1, length)
            before, after = np.take(whole, here, keys), np.take(whole, there, keys)
            if rows is not None:
                before, after = np.take(before, here, rows), np.take(after, there, rows)
            if not _same(*_lined_up(before, after, rows, keys), shifts=value.dtype in _REAL):
                return False
        return True

    def forbids_later(
        self, node: ir.Node, value: ir.Value, sense: str, axes: tuple[int | None, int | None]
    ) -> bool:
        """Whether ``value`` masks every key after its query.

        Args:
            node: Reader of the value, for the refusal.
            value: A mask.
            sense: ``"keep"`` (bool, True attends), ``"drop"`` (bool, True does not), ``"add"`` or
                ``"subtract"`` (a low number, or a high one).
            axes: Axes of queries and of keys.

        Raises:
            NotIncrementalError: it cannot be evaluated.
        """
        rows, keys = axes
        if rows is None or keys is None:
            return False
        for _, length in self._pairs(value, square=True):
            for mask in self._masks(length):
                found = np.moveaxis(self._evaluate(node, value, mask), (rows, keys), (-2, -1))
                later = ~np.tri(length, dtype=np.bool_)
                if not np.all(_forbidden(found, sense) | ~later):
                    return False
        return True

    def _pairs(self, value: ir.Value, *, square: bool) -> Iterator[tuple[int, int]]:
        """Yield lengths to compare: short ones, and some as long as any constant tells."""
        limit = self._program.facts.max_length or 1 << 20
        first = min(_SHORT, limit)
        yield max(1, first - 4), first
        probe = Probe(self._program, [value])
        told = min(max(lengths(probe, limit), default=0), limit)
        long = min(told, _LONGEST_SQUARE) if square else told
        if long > first:
            yield long - 3, long

    def _masks(self, length: int) -> Iterator[npt.NDArray[np.int64]]:
        """Yield attention masks: no padding, then some on either side if there is a mask."""
        whole = np.ones((_BATCH, length), np.int64)
        yield whole
        if self._program.input(Role.MASK) is not None:
            for side in (slice(2), slice(-2, None)):
                padded = whole.copy()
                padded[1, side] = 0
                yield padded

    def _evaluate(self, node: ir.Node, value: ir.Value, mask: npt.NDArray[np.int64]) -> Array:
        probe = Probe(self._program, [value])
        if (reason := probe.obstacle()) is not None:
            raise refuse(node, f"reads {value.name!r}, which cannot be evaluated: {reason}")
        batch, length = mask.shape
        port = self._program.signature.find(Role.MASK)
        given = {} if port is None else {port.name: mask.astype(port.dtype)}
        found = probe.attempt(given, {"B": batch, "S": length, "P": 0, "T": length})
        if isinstance(found, str):
            raise refuse(node, f"reads {value.name!r}, which cannot be evaluated: {found}")
        array: Array = found[0]
        return array


def _lined_up(
    before: Array, after: Array, rows: int | None, keys: int | None
) -> tuple[Array, Array]:
    """Return both with keys last, and what is after its query left out."""
    if keys is None:
        return before[..., None], after[..., None]
    before, after = np.moveaxis(before, keys, -1), np.moveaxis(after, keys, -1)
    if rows is None or before.shape != after.shape:
        return before, after
    at = rows - (keys < rows)
    before, after = np.moveaxis(before, at, -2), np.moveaxis(after, at, -2)
    seen = np.tri(before.shape[-2], before.shape[-1], dtype=np.bool_)
    nothing = before.dtype.type(np.nan if before.dtype.kind == "f" else 0)
    return np.where(seen, before, nothing), np.where(seen, after, nothing)


def _same(before: Array, after: Array, *, shifts: bool) -> bool:
    if before.shape != after.shape:
        return False
    if before.dtype.kind != "f":
        return bool(np.array_equal(before, after))
    low = before <= FORBIDDEN
    if not np.array_equal(low, after <= FORBIDDEN):
        return False
    if shifts:
        return _shifted(np.where(low, np.nan, before), np.where(low, np.nan, after))
    left, right = before[~low], after[~low]
    scale = float(np.nanmax(np.abs(left), initial=1.0))
    return bool(np.allclose(left, right, rtol=_CLOSE, atol=_CLOSE * scale, equal_nan=True))


def _shifted(before: Array, after: Array) -> bool:
    """Whether the two differ by one number in each row; NaN is masked."""
    apart = after - before
    if np.all(np.isnan(apart)):
        return True
    with np.errstate(all="ignore"):
        first = np.nanmin(np.where(np.isnan(apart), np.inf, apart), axis=-1, keepdims=True)
    off = np.nan_to_num(np.abs(apart - first))
    scale = float(np.nanmax(np.abs(before), initial=1.0))
    return bool(off.max(initial=0.0) <= _CLOSE * scale)


def _forbidden(mask: Array, sense: str) -> npt.NDArray[np.bool_]:
    """Return where a mask of this sense lets nothing through."""
    if sense == "keep":
        return np.asarray(~mask.astype(np.bool_))
    if sense == "drop":
        return np.asarray(mask.astype(np.bool_))
    return np.asarray((mask if sense == "add" else -mask) <= FORBIDDEN)
