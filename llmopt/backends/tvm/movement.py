"""Operators that move numbers, make them or tell their sizes; none computes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from llmopt.backends.tvm import api
from llmopt.backends.tvm.sizes import bounds, known
from llmopt.backends.tvm.writing import (
    FunctionWriter,
    Rule,
    axes_of,
    needed,
    numbers,
    shape_of,
)
from llmopt.ir import graph as g


def _identity(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    return [w.tensor(node.inputs[0])]


def _shape(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    sizes = shape_of(w.tensor(node.inputs[0]))
    return [known(sizes[g.attribute(node, "start", 0) : g.attribute(node, "end", None)])]


def _size(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    return [known(api.simplify(api.product(shape_of(w.tensor(node.inputs[0])))))]


def _reshape(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    sizes, target = shape_of(x), numbers(w, node, 1)
    copied = not g.attribute(node, "allowzero", 0)
    wanted = [sizes[i] if copied and n == 0 else n for i, n in enumerate(target)]
    return [_reshaped(x, wanted)]


def _reshaped(x: Any, wanted: Sequence[Any]) -> Any:
    """Return ``x`` with other sizes; -1 is what is left over."""
    sizes = list(wanted)
    if -1 in [size for size in sizes if isinstance(size, int)]:
        at = next(i for i, size in enumerate(sizes) if isinstance(size, int) and size == -1)
        rest = api.product(sizes[:at] + sizes[at + 1 :])
        sizes[at] = api.simplify(api.product(shape_of(x)) // rest)
    return api.relax().op.reshape(x, sizes)


def _flatten(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    sizes, axis = shape_of(x), g.attribute(node, "axis", 1)
    return [_reshaped(x, [api.product(sizes[:axis]), api.product(sizes[axis:])])]


def _transpose(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    default = list(range(len(shape_of(x))))[::-1]
    return [api.relax().op.permute_dims(x, list(g.attribute(node, "perm", default)))]


def _squeeze(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    sizes = shape_of(x)
    if g.optional(node, 1) is None:
        gone = {i for i, size in enumerate(sizes) if isinstance(size, int) and size == 1}
    else:
        gone = set(axes_of(w, node, len(sizes)))
    return [_reshaped(x, [size for i, size in enumerate(sizes) if i not in gone])]


def _unsqueeze(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    sizes = shape_of(x)
    new = axes_of(w, node, len(sizes) + len(numbers(w, node, 1)))
    for axis in sorted(new):
        sizes.insert(axis, 1)
    return [_reshaped(x, sizes)]


def _concat(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    tensors = [w.tensor(value) for value in node.inputs]
    return [api.relax().op.concat(tensors, g.attribute(node, "axis", 0))]


def _split(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    axis = g.attribute(node, "axis", 0) % len(shape_of(x))
    size = shape_of(x)[axis]
    if g.optional(node, 1) is not None:
        parts = [int(n) for n in numbers(w, node, 1)]
    else:
        parts = [-(-size // len(node.outputs))] * len(node.outputs)
    slices = pairwise(np.cumsum([0, *parts]).tolist())
    return [
        w.emit(api.relax().op.strided_slice(x, [axis], [start], [min(end, size)]))
        for start, end in slices
    ]


def _slice(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    sizes = shape_of(x)
    starts, ends = numbers(w, node, 1), numbers(w, node, 2)
    if g.optional(node, 3) is None:
        axes = list(range(len(starts)))
    else:
        axes = axes_of(w, node, len(sizes), 3)
    steps = [1] * len(axes) if g.optional(node, 4) is None else numbers(w, node, 4)
    limits = zip(axes, starts, ends, strict=True)
    sides = [bounds(sizes[axis], start, end) for axis, start, end in limits]
    kept = [
        (axis, begin, end, step)
        for axis, (begin, end), step in zip(axes, sides, steps, strict=True)
        if not (api.equal(begin, 0) and api.equal(end, sizes[axis]) and step == 1)
    ]
    if not kept:
        return [x]
    axes, begins, ends, steps = (list(column) for column in zip(*kept, strict=True))
    return [api.relax().op.strided_slice(x, axes, begins, ends, steps, assume_inbound=True)]


def _expand(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    x, target = w.tensor(node.inputs[0]), numbers(w, node, 1)
    sizes = shape_of(x)
    depth = max(len(sizes), len(target))
    sizes = [1] * (depth - len(sizes)) + sizes
    target = [1] * (depth - len(target)) + target
    wanted = [b if api.equal(a, 1) else a for a, b in zip(sizes, target, strict=True)]
    return [api.relax().op.broadcast_to(x, wanted)]


def _gather(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    x, index = w.tensor(node.inputs[0]), w.tensor(node.inputs[1])
    axis = g.attribute(node, "axis", 0)
    return [api.relax().op.take(x, index, axis, "fast")]


def _gather_elements(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    x, index = w.tensor(node.inputs[0]), w.tensor(node.inputs[1])
    return [api.relax().op.gather_elements(x, index, g.attribute(node, "axis", 0))]


def _gather_nd(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    x, index = w.tensor(node.inputs[0]), w.tensor(node.inputs[1])
    return [api.relax().op.gather_nd(x, index, g.attribute(node, "batch_dims", 0))]


def _range(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    start, end, step = (needed(w, node, i).item() for i in range(3))
    dtype = node.outputs[0].dtype or ir.DataType.INT64
    return [api.relax().op.arange(start, end, step, dtype.numpy().name)]


def _constant_of_shape(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    value = g.attribute(node, "value", None)
    array = np.zeros(1, np.float32) if value is None else value.numpy()
    fill = api.scalar(array.reshape(-1)[0].item(), array.dtype.name)
    return [api.relax().op.full(numbers(w, node, 0), fill, array.dtype.name)]


def _trilu(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    op = api.relax().op
    keep = op.triu if g.attribute(node, "upper", 1) else op.tril
    offset = 0 if g.optional(node, 1) is None else needed(w, node, 1).item()
    return [keep(w.tensor(node.inputs[0]), offset)]


RULES: Final[Mapping[str, Rule]] = {
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Identity": _identity,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
