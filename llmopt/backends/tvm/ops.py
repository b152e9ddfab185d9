"""One small function for each operator of the dialect that needs no kernel of ours.

Each takes the function being written and the node, and returns what each output is: an expression
of Relax, or a known value (`sizes`). TVM fuses and compiles the element-wise ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, Protocol

import numpy as np
import onnx_ir as ir

from llmopt.backends.tvm import api
from llmopt.backends.tvm.sizes import Known, bounds, known
from llmopt.errors import UnsupportedModelError
from llmopt.ir import graph as g


class Writer(Protocol):
    """The function that operators are written into."""

    def tensor(self, value: ir.Value | None) -> Any:
        """Return a value of the graph as an expression of Relax."""

    def known(self, value: ir.Value | None) -> Known | None:
        """Return a value of the graph where it is known while compiling."""

    def emit(self, expression: Any) -> Any:
        """Bind an expression to a variable and return it."""


Rule = Callable[[Writer, ir.Node], Sequence[Any]]


def shape_of(expression: Any) -> list[Any]:
    """Return the sizes of an expression: numbers where they are, else expressions."""
    return [api.plain(size) for size in expression.ty.shape.values]


def dtype_of(expression: Any) -> str:
    """Return the element type of an expression."""
    return str(expression.ty.dtype.dtype)


def needed(w: Writer, node: ir.Node, index: int) -> Known:
    """Return an operand that must be known while compiling.

    Raises:
        UnsupportedModelError: it depends on the input's numbers.
    """
    found = w.known(g.optional(node, index))
    if found is None:
        problem = f"{node.op_type} ({node.name!r}) takes sizes that depend on the input's numbers"
        raise UnsupportedModelError("model", [problem], "use --target onnxruntime-cpu")
    return found


def _numbers(w: Writer, node: ir.Node, index: int) -> list[Any]:
    return list(needed(w, node, index).reshape(-1))


def _axes(w: Writer, node: ir.Node, rank: int, index: int = 1) -> list[int]:
    """Return the axes that an operand or attribute names; all where neither does."""
    if g.optional(node, index) is not None:
        given = [int(axis) for axis in _numbers(w, node, index)]
    else:
        given = list(g.attribute(node, "axes", ()) or range(rank))
    return [axis % rank for axis in given]


def _unary(name: str) -> Rule:
    return lambda w, node: [getattr(api.relax().op, name)(w.tensor(node.inputs[0]))]


def _binary(name: str) -> Rule:
    def rule(w: Writer, node: ir.Node) -> Sequence[Any]:
        left, right = (w.tensor(node.inputs[i]) for i in (0, 1))
        return [getattr(api.relax().op, name)(left, right)]

    return rule


def _variadic(name: str) -> Rule:
    def rule(w: Writer, node: ir.Node) -> Sequence[Any]:
        total = w.tensor(node.inputs[0])
        for value in node.inputs[1:]:
            total = w.emit(getattr(api.relax().op, name)(total, w.tensor(value)))
        return [total]

    return rule


def _reduce(name: str) -> Rule:
    def rule(w: Writer, node: ir.Node) -> Sequence[Any]:
        x = w.tensor(node.inputs[0])
        axes = _axes(w, node, len(shape_of(x)))
        keep = bool(g.attribute(node, "keepdims", 1))
        return [getattr(api.relax().op, name)(x, axes, keep)]

    return rule


def _reduce_l2(w: Writer, node: ir.Node) -> Sequence[Any]:
    op = api.relax().op
    x = w.tensor(node.inputs[0])
    axes = _axes(w, node, len(shape_of(x)))
    keep = bool(g.attribute(node, "keepdims", 1))
    squares = w.emit(op.sum(w.emit(op.multiply(x, x)), axes, keep))
    return [op.sqrt(squares)]


def _divide(w: Writer, node: ir.Node) -> Sequence[Any]:
    left, right = (w.tensor(node.inputs[i]) for i in (0, 1))
    op = api.relax().op
    real = dtype_of(left).startswith("float")
    return [op.divide(left, right) if real else op.floor_divide(left, right)]


def _reciprocal(w: Writer, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    return [api.relax().op.divide(api.scalar(1.0, dtype_of(x)), x)]


def _mod(w: Writer, node: ir.Node) -> Sequence[Any]:
    op = api.relax().op
    left, right = (w.tensor(node.inputs[i]) for i in (0, 1))
    return [op.mod(left, right) if g.attribute(node, "fmod", 0) else op.floor_mod(left, right)]


def _cast(w: Writer, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    dtype = ir.DataType(g.attribute(node, "to", 1)).numpy().name
    op = api.relax().op
    if dtype == "bool":
        return [op.not_equal(x, api.scalar(0, dtype_of(x)))]
    return [x if dtype_of(x) == dtype else op.astype(x, dtype)]


def _clip(w: Writer, node: ir.Node) -> Sequence[Any]:
    op = api.relax().op
    x = w.tensor(node.inputs[0])
    if g.optional(node, 1) is not None:
        x = w.emit(op.maximum(x, w.tensor(node.inputs[1])))
    if g.optional(node, 2) is not None:
        x = w.emit(op.minimum(x, w.tensor(node.inputs[2])))
    return [x]


def _gelu(w: Writer, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    nn = api.relax().op.nn
    by_tanh = g.attribute(node, "approximate", "none") == "tanh"
    return [nn.gelu_tanh(x) if by_tanh else nn.gelu(x)]


def _swish(w: Writer, node: ir.Node) -> Sequence[Any]:
    op = api.relax().op
    x = w.tensor(node.inputs[0])
    alpha = g.attribute(node, "alpha", 1.0)
    inner = x if alpha == 1.0 else w.emit(op.multiply(x, api.scalar(alpha, dtype_of(x))))
    return [op.multiply(x, w.emit(op.sigmoid(inner)))]


def _relu(w: Writer, node: ir.Node) -> Sequence[Any]:
    return [api.relax().op.nn.relu(w.tensor(node.inputs[0]))]


def _softplus(w: Writer, node: ir.Node) -> Sequence[Any]:
    op = api.relax().op
    x = w.tensor(node.inputs[0])
    one, zero = api.scalar(1.0, dtype_of(x)), api.scalar(0.0, dtype_of(x))
    small = w.emit(op.exp(w.emit(op.negative(w.emit(op.abs(x))))))
    tail = w.emit(op.log(w.emit(op.add(one, small))))
    return [op.add(w.emit(op.maximum(x, zero)), tail)]


def _softmax(w: Writer, node: ir.Node) -> Sequence[Any]:
    return [api.relax().op.nn.softmax(w.tensor(node.inputs[0]), g.attribute(node, "axis", -1))]


def _identity(w: Writer, node: ir.Node) -> Sequence[Any]:
    return [w.tensor(node.inputs[0])]


def _shape(w: Writer, node: ir.Node) -> Sequence[Any]:
    sizes = shape_of(w.tensor(node.inputs[0]))
    return [known(sizes[g.attribute(node, "start", 0) : g.attribute(node, "end", None)])]


def _size(w: Writer, node: ir.Node) -> Sequence[Any]:
    return [known(api.simplify(api.product(shape_of(w.tensor(node.inputs[0])))))]


def _reshape(w: Writer, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    sizes, target = shape_of(x), _numbers(w, node, 1)
    copied = not g.attribute(node, "allowzero", 0)
    wanted = [sizes[i] if copied and n == 0 else n for i, n in enumerate(target)]
    return [reshaped(x, wanted)]


def reshaped(x: Any, wanted: Sequence[Any]) -> Any:
    """Return ``x`` with other sizes; -1 is what is left over."""
    sizes = list(wanted)
    if -1 in [size for size in sizes if isinstance(size, int)]:
        at = next(i for i, size in enumerate(sizes) if isinstance(size, int) and size == -1)
        rest = api.product(sizes[:at] + sizes[at + 1 :])
        sizes[at] = api.simplify(api.product(shape_of(x)) // rest)
    return api.relax().op.reshape(x, sizes)


def _flatten(w: Writer, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    sizes, axis = shape_of(x), g.attribute(node, "axis", 1)
    return [reshaped(x, [api.product(sizes[:axis]), api.product(sizes[axis:])])]


def _transpose(w: Writer, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    default = list(range(len(shape_of(x))))[::-1]
    return [api.relax().op.permute_dims(x, list(g.attribute(node, "perm", default)))]


def _squeeze(w: Writer, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    sizes = shape_of(x)
    if g.optional(node, 1) is None:
        gone = {i for i, size in enumerate(sizes) if isinstance(size, int) and size == 1}
    else:
        gone = set(_axes(w, node, len(sizes)))
    return [reshaped(x, [size for i, size in enumerate(sizes) if i not in gone])]


def _unsqueeze(w: Writer, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    sizes = shape_of(x)
    new = _axes(w, node, len(sizes) + len(_numbers(w, node, 1)))
    for axis in sorted(new):
        sizes.insert(axis, 1)
    return [reshaped(x, sizes)]


def _concat(w: Writer, node: ir.Node) -> Sequence[Any]:
    tensors = [w.tensor(value) for value in node.inputs]
    return [api.relax().op.concat(tensors, g.attribute(node, "axis", 0))]


def _split(w: Writer, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    axis = g.attribute(node, "axis", 0) % len(shape_of(x))
    size = shape_of(x)[axis]
    if g.optional(node, 1) is not None:
        parts = [int(n) for n in _numbers(w, node, 1)]
    else:
        parts = [-(-size // len(node.outputs))] * len(node.outputs)
    slices = pairwise(np.cumsum([0, *parts]).tolist())
    return [
        w.emit(api.relax().op.strided_slice(x, [axis], [start], [min(end, size)]))
        for start, end in slices
    ]


def _slice(w: Writer, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    sizes = shape_of(x)
    starts, ends = _numbers(w, node, 1), _numbers(w, node, 2)
    if g.optional(node, 3) is None:
        axes = list(range(len(starts)))
    else:
        axes = _axes(w, node, len(sizes), 3)
    steps = [1] * len(axes) if g.optional(node, 4) is None else _numbers(w, node, 4)
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


def _expand(w: Writer, node: ir.Node) -> Sequence[Any]:
    x, target = w.tensor(node.inputs[0]), _numbers(w, node, 1)
    sizes = shape_of(x)
    depth = max(len(sizes), len(target))
    sizes = [1] * (depth - len(sizes)) + sizes
    target = [1] * (depth - len(target)) + target
    wanted = [b if api.equal(a, 1) else a for a, b in zip(sizes, target, strict=True)]
    return [api.relax().op.broadcast_to(x, wanted)]


def _gather(w: Writer, node: ir.Node) -> Sequence[Any]:
    x, index = w.tensor(node.inputs[0]), w.tensor(node.inputs[1])
    axis = g.attribute(node, "axis", 0)
    return [api.relax().op.take(x, index, axis, "fast")]


def _gather_elements(w: Writer, node: ir.Node) -> Sequence[Any]:
    x, index = w.tensor(node.inputs[0]), w.tensor(node.inputs[1])
    return [api.relax().op.gather_elements(x, index, g.attribute(node, "axis", 0))]


def _gather_nd(w: Writer, node: ir.Node) -> Sequence[Any]:
    x, index = w.tensor(node.inputs[0]), w.tensor(node.inputs[1])
    return [api.relax().op.gather_nd(x, index, g.attribute(node, "batch_dims", 0))]


def _range(w: Writer, node: ir.Node) -> Sequence[Any]:
    start, end, step = (needed(w, node, i).item() for i in range(3))
    dtype = node.outputs[0].dtype or ir.DataType.INT64
    return [api.relax().op.arange(start, end, step, dtype.numpy().name)]


def _constant_of_shape(w: Writer, node: ir.Node) -> Sequence[Any]:
    value = g.attribute(node, "value", None)
    array = np.zeros(1, np.float32) if value is None else value.numpy()
    fill = api.scalar(array.reshape(-1)[0].item(), array.dtype.name)
    return [api.relax().op.full(_numbers(w, node, 0), fill, array.dtype.name)]


def _trilu(w: Writer, node: ir.Node) -> Sequence[Any]:
    op = api.relax().op
    keep = op.triu if g.attribute(node, "upper", 1) else op.tril
    offset = 0 if g.optional(node, 1) is None else needed(w, node, 1).item()
    return [keep(w.tensor(node.inputs[0]), offset)]


def _cumsum(w: Writer, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    axis = int(needed(w, node, 1).item()) % len(shape_of(x))
    exclusive = bool(g.attribute(node, "exclusive", 0))
    return [api.relax().op.cumsum(x, axis, dtype_of(x), exclusive)]


def _where(w: Writer, node: ir.Node) -> Sequence[Any]:
    return [api.relax().op.where(*(w.tensor(value) for value in node.inputs))]


def _matmul(w: Writer, node: ir.Node) -> Sequence[Any]:
    return [api.relax().op.matmul(w.tensor(node.inputs[0]), w.tensor(node.inputs[1]))]


def _quantize(w: Writer, node: ir.Node) -> Sequence[Any]:
    op = api.relax().op
    x, scale = w.tensor(node.inputs[0]), w.tensor(node.inputs[1])
    zero = g.optional(node, 2)
    dtype = "uint8" if zero is None else dtype_of(w.tensor(zero))
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    steps = w.emit(op.round(w.emit(op.divide(x, scale))))
    if zero is not None:
        steps = w.emit(op.add(steps, w.emit(op.astype(w.tensor(zero), "float32"))))
    return [op.astype(w.emit(op.clip(steps, low, high)), dtype)]


def _dequantize(w: Writer, node: ir.Node) -> Sequence[Any]:
    op = api.relax().op
    x = w.emit(op.astype(w.tensor(node.inputs[0]), "float32"))
    scale, zero = w.tensor(node.inputs[1]), g.optional(node, 2)
    if zero is not None:
        x = w.emit(op.subtract(x, w.emit(op.astype(w.tensor(zero), "float32"))))
    return [op.multiply(x, scale)]


RULES: Final[Mapping[str, Rule]] = {
    "Abs": _unary("abs"),
    "Add": _binary("add"),
    "And": _binary("logical_and"),
    "Cast": _cast,
    "Ceil": _unary("ceil"),
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Cos": _unary("cos"),
    "CumSum": _cumsum,
    "DequantizeLinear": _dequantize,
    "Div": _divide,
    "Equal": _binary("equal"),
    "Erf": _unary("erf"),
    "Exp": _unary("exp"),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _unary("floor"),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gelu": _gelu,
    "Greater": _binary("greater"),
    "GreaterOrEqual": _binary("greater_equal"),
    "Identity": _identity,
    "Less": _binary("less"),
    "LessOrEqual": _binary("less_equal"),
    "Log": _unary("log"),
    "MatMul": _matmul,
    "Max": _variadic("maximum"),
    "Min": _variadic("minimum"),
    "Mod": _mod,
    "Mul": _binary("multiply"),
    "Neg": _unary("negative"),
    "Not": _unary("logical_not"),
    "Or": _binary("logical_or"),
    "Pow": _binary("power"),
    "QuantizeLinear": _quantize,
    "Range": _range,
    "Reciprocal": _reciprocal,
    "ReduceL2": _reduce_l2,
    "ReduceMax": _reduce("max"),
    "ReduceMean": _reduce("mean"),
    "ReduceMin": _reduce("min"),
    "ReduceSum": _reduce("sum"),
    "Relu": _relu,
    "Reshape": _reshape,
    "Round": _unary("round"),
    "Shape": _shape,
    "Sigmoid": _unary("sigmoid"),
    "Sign": _unary("sign"),
    "Sin": _unary("sin"),
    "Size": _size,
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _softplus,
    "Split": _split,
    "Sqrt": _unary("sqrt"),
    "Squeeze": _squeeze,
    "Sub": _binary("subtract"),
    "Swish": _swish,
    "Tanh": _unary("tanh"),
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
    "Xor": _binary("logical_xor"),
}
