"""Weights that stay on disk until somebody needs their numbers.

A weight is an ``ir.LazyTensor``: a name, a shape, a dtype, and a function that reads it. What a
pass makes of one (a transpose, a concatenation) is lazy as well and remembers what it was made
from, so a merged and transposed matrix can still be traced back to the checkpoint's tensors.
Nothing is cached: every read is fresh, and its memory is free as soon as the reader drops it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from llmopt.interface.arrays import Array


class Leaf(ir.LazyTensor):
    """A tensor of the source: read afresh each time it is asked for.

    Args:
        name: The parameter's name in the source.
        read: Returns the numbers, with exactly ``dtype`` and ``shape``.
        dtype: Element type.
        shape: Sizes.
    """

    def __init__(
        self, name: str, read: Callable[[], Array], dtype: ir.DataType, shape: Sequence[int]
    ) -> None:
        super().__init__(lambda: ir.tensor(read(), dtype), dtype, ir.Shape(shape), name=name)
        self.source = name


class Derived(ir.LazyTensor):
    """A tensor computed from others when it is read.

    Args:
        op: Operation on the parts: ``"transpose"``, ``"concat"``, ``"cast"``, ...
        parts: The tensors it is made from.
        compute: Arrays of the parts to the array of the result.
        dtype: Element type of the result.
        shape: Sizes of the result.
    """

    def __init__(
        self,
        op: str,
        parts: Sequence[ir.TensorProtocol],
        compute: Callable[..., Array],
        dtype: ir.DataType,
        shape: Sequence[int],
    ) -> None:
        def evaluate() -> ir.TensorProtocol:
            result = np.ascontiguousarray(compute(*(part.numpy() for part in parts)))
            return ir.tensor(result, dtype)

        super().__init__(evaluate, dtype, ir.Shape(shape), name=None)
        self.op = op
        self.parts = tuple(parts)


def transposed(tensor: ir.TensorProtocol, perm: Sequence[int] | None = None) -> ir.TensorProtocol:
    """Return ``tensor`` with its axes reordered; two reversals of a matrix cancel."""
    perm = list(range(len(tensor.shape)))[::-1] if perm is None else list(perm)
    shape = [_sizes(tensor)[axis] for axis in perm]
    if perm == list(range(len(perm))):
        return tensor
    if perm == [1, 0] and is_transpose(tensor):
        return parts_of(tensor)[0]
    op = "transpose" if perm == [1, 0] else f"transpose{perm}"
    return Derived(op, [tensor], lambda a: np.transpose(a, perm), tensor.dtype, shape)


def concatenated(tensors: Sequence[ir.TensorProtocol], axis: int) -> ir.TensorProtocol:
    """Return ``tensors`` joined along ``axis``; joined columns stay a transpose of joined rows."""
    if len(tensors) == 1:
        return tensors[0]
    if all(is_transpose(tensor) for tensor in tensors):
        return transposed(concatenated([parts_of(tensor)[0] for tensor in tensors], 1 - axis))
    shape = _sizes(tensors[0])
    shape[axis] = sum(_sizes(tensor)[axis] for tensor in tensors)
    return Derived(
        "concat",
        tensors,
        lambda *arrays: np.concatenate(arrays, axis),
        tensors[0].dtype,
        shape,
    )


def flattened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return ``tensor`` [..., K] as a matrix [N, K] of the same rows."""
    columns = _sizes(tensor)[-1]
    shape = [math.prod(_sizes(tensor)[:-1]), columns]
    return Derived("flatten", [tensor], lambda a: a.reshape(shape), tensor.dtype, shape)


def stacked(tensors: Sequence[ir.TensorProtocol], count: int, width: int) -> ir.TensorProtocol:
    """Return matrices as one tensor [E, N, width].

    Args:
        tensors: Each some of the matrices, one below the other: [E' * N, K].
        count: E, how many matrices there are in all.
        width: Number of columns of each row to keep, K at most.
    """
    rows = sum(_sizes(tensor)[0] for tensor in tensors) // count
    shape = (count, rows, width)

    def compute(*arrays: Array) -> Array:
        return np.concatenate([array[:, :width] for array in arrays]).reshape(shape)

    return Derived("stack", tensors, compute, tensors[0].dtype, shape)


def interleaved(tensor: ir.TensorProtocol, count: int) -> ir.TensorProtocol:
    """Return ``count`` matrices [2 * N, K], one below the other, with row N + i behind row i."""
    rows, columns = _sizes(tensor)
    halves = (count, 2, rows // count // 2, columns)

    def compute(array: Array) -> Array:
        return array.reshape(halves).swapaxes(1, 2).reshape(rows, columns)

    return Derived(f"interleave{count}", [tensor], compute, tensor.dtype, (rows, columns))


def taken(tensor: ir.TensorProtocol, order: Array, axis: int) -> ir.TensorProtocol:
    """Return the rows or columns of ``tensor`` in another order; a transpose stays one."""
    if is_transpose(tensor):
        return transposed(taken(parts_of(tensor)[0], order, 1 - axis))
    places = np.asarray(order, np.int64)
    digest = hashlib.sha256(places.tobytes()).hexdigest()[:16]
    shape = _sizes(tensor)
    shape[axis] = places.size
    return Derived(
        f"take {digest} of axis {axis}",
        [tensor],
        lambda a: np.take(a, places, axis),
        tensor.dtype,
        shape,
    )


def split(tensor: ir.TensorProtocol, sizes: Sequence[int], axis: int) -> list[ir.TensorProtocol]:
    """Return the parts of ``tensor`` along ``axis``; those of a transpose are transposes."""
    if is_transpose(tensor):
        return [transposed(part) for part in split(parts_of(tensor)[0], sizes, 1 - axis)]
    ends = np.cumsum([0, *sizes])
    return [_cut(tensor, int(start), int(end), axis) for start, end in pairwise(ends)]


def _cut(tensor: ir.TensorProtocol, start: int, end: int, axis: int) -> ir.TensorProtocol:
    cut = tuple(slice(start, end) if i == axis else slice(None) for i in range(axis + 1))
    shape = _sizes(tensor)
    shape[axis] = end - start
    return Derived(f"{start}:{end} of axis {axis}", [tensor], lambda a: a[cut], tensor.dtype, shape)


def cast(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """Return ``tensor`` with its elements converted."""
    if tensor.dtype == dtype:
        return tensor
    return Derived("cast", [tensor], lambda a: a.astype(dtype.numpy()), dtype, _sizes(tensor))


def is_transpose(tensor: ir.TensorProtocol | None) -> bool:
    """Whether ``tensor`` is a lazily transposed matrix."""
    return isinstance(tensor, Derived) and tensor.op == "transpose"


def parts_of(tensor: ir.TensorProtocol) -> tuple[ir.TensorProtocol, ...]:
    """Return what a derived tensor is made from; nothing for any other."""
    return tensor.parts if isinstance(tensor, Derived) else ()


def leaves(tensor: ir.TensorProtocol) -> Iterator[Leaf]:
    """Yield the source tensors that ``tensor`` is made from, in order."""
    if isinstance(tensor, Leaf):
        yield tensor
    for part in parts_of(tensor):
        yield from leaves(part)


def identity(tensor: ir.TensorProtocol) -> object:
    """Return a key that two tensors share only when they hold the same numbers.

    Source tensors are identified by name, derived ones by operation and operands; anything else
    by object, which never merges two tensors wrongly.
    """
    if isinstance(tensor, Leaf):
        return ("leaf", tensor.source, tensor.dtype)
    if isinstance(tensor, Derived):
        return (tensor.op, tensor.dtype, *_sizes(tensor), *(identity(p) for p in tensor.parts))
    return id(tensor)


def _sizes(tensor: ir.TensorProtocol) -> list[int]:
    return list(tensor.shape.numpy())
