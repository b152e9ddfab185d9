"""Operators that compute numbers and need no kernel of ours: TVM fuses and compiles them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from llmopt.backends.tvm import api
from llmopt.backends.tvm.writing import (
    FunctionWriter,
    Rule,
    axes_of,
    dtype_of,
    needed,
    shape_of,
)
from llmopt.ir import graph as g


def _unary(name: str) -> Rule:
    return lambda w, node: [getattr(api.relax().op, name)(w.tensor(node.inputs[0]))]


def _binary(name: str) -> Rule:
    def rule(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
        left, right = (w.tensor(node.inputs[i]) for i in (0, 1))
        return [getattr(api.relax().op, name)(left, right)]

    return rule


def _variadic(name: str) -> Rule:
    def rule(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
        total = w.tensor(node.inputs[0])
        for value in node.inputs[1:]:
            total = w.emit(getattr(api.relax().op, name)(total, w.tensor(value)))
        return [total]

    return rule


def _reduce(name: str) -> Rule:
    def rule(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
        x = w.tensor(node.inputs[0])
        axes = axes_of(w, node, len(shape_of(x)))
        keep = bool(g.attribute(node, "keepdims", 1))
        return [getattr(api.relax().op, name)(x, axes, keep)]

    return rule


def _reduce_l2(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    op = api.relax().op
    x = w.tensor(node.inputs[0])
    axes = axes_of(w, node, len(shape_of(x)))
    keep = bool(g.attribute(node, "keepdims", 1))
    squares = w.emit(op.sum(w.emit(op.multiply(x, x)), axes, keep))
    return [op.sqrt(squares)]


def _divide(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    left, right = (w.tensor(node.inputs[i]) for i in (0, 1))
    op = api.relax().op
    real = dtype_of(left).startswith("float")
    return [op.divide(left, right) if real else op.floor_divide(left, right)]


def _reciprocal(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    return [api.relax().op.divide(api.scalar(1.0, dtype_of(x)), x)]


def _mod(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    op = api.relax().op
    left, right = (w.tensor(node.inputs[i]) for i in (0, 1))
    return [op.mod(left, right) if g.attribute(node, "fmod", 0) else op.floor_mod(left, right)]


def _cast(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    dtype = ir.DataType(g.attribute(node, "to", 1)).numpy().name
    op = api.relax().op
    if dtype == "bool":
        return [op.not_equal(x, api.scalar(0, dtype_of(x)))]
    return [x if dtype_of(x) == dtype else op.astype(x, dtype)]


def _clip(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    op = api.relax().op
    x = w.tensor(node.inputs[0])
    if g.optional(node, 1) is not None:
        x = w.emit(op.maximum(x, w.tensor(node.inputs[1])))
    if g.optional(node, 2) is not None:
        x = w.emit(op.minimum(x, w.tensor(node.inputs[2])))
    return [x]


def _gelu(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    nn = api.relax().op.nn
    by_tanh = g.attribute(node, "approximate", "none") == "tanh"
    return [nn.gelu_tanh(x) if by_tanh else nn.gelu(x)]


def _swish(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    op = api.relax().op
    x = w.tensor(node.inputs[0])
    alpha = g.attribute(node, "alpha", 1.0)
    inner = x if alpha == 1.0 else w.emit(op.multiply(x, api.scalar(alpha, dtype_of(x))))
    return [op.multiply(x, w.emit(op.sigmoid(inner)))]


def _relu(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    return [api.relax().op.nn.relu(w.tensor(node.inputs[0]))]


def _softplus(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    op = api.relax().op
    x = w.tensor(node.inputs[0])
    one, zero = api.scalar(1.0, dtype_of(x)), api.scalar(0.0, dtype_of(x))
    small = w.emit(op.exp(w.emit(op.negative(w.emit(op.abs(x))))))
    tail = w.emit(op.log(w.emit(op.add(one, small))))
    return [op.add(w.emit(op.maximum(x, zero)), tail)]


def _softmax(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    return [api.relax().op.nn.softmax(w.tensor(node.inputs[0]), g.attribute(node, "axis", -1))]


def _cumsum(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    x = w.tensor(node.inputs[0])
    axis = int(needed(w, node, 1).item()) % len(shape_of(x))
    exclusive = bool(g.attribute(node, "exclusive", 0))
    return [api.relax().op.cumsum(x, axis, dtype_of(x), exclusive)]


def _where(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    return [api.relax().op.where(*(w.tensor(value) for value in node.inputs))]


def _matmul(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    return [api.relax().op.matmul(w.tensor(node.inputs[0]), w.tensor(node.inputs[1]))]


def _quantize(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
    op = api.relax().op
    x, scale = w.tensor(node.inputs[0]), w.tensor(node.inputs[1])
    zero = g.optional(node, 2)
    dtype = "uint8" if zero is None else dtype_of(w.tensor(zero))
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    steps = w.emit(op.round(w.emit(op.divide(x, scale))))
    if zero is not None:
        steps = w.emit(op.add(steps, w.emit(op.astype(w.tensor(zero), "float32"))))
    return [op.astype(w.emit(op.clip(steps, low, high)), dtype)]


def _dequantize(w: FunctionWriter, node: ir.Node) -> Sequence[Any]:
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
    "Cos": _unary("cos"),
    "CumSum": _cumsum,
    "DequantizeLinear": _dequantize,
    "Div": _divide,
    "Equal": _binary("equal"),
    "Erf": _unary("erf"),
    "Exp": _unary("exp"),
    "Floor": _unary("floor"),
    "Gelu": _gelu,
    "Greater": _binary("greater"),
    "GreaterOrEqual": _binary("greater_equal"),
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
    "Reciprocal": _reciprocal,
    "ReduceL2": _reduce_l2,
    "ReduceMax": _reduce("max"),
    "ReduceMean": _reduce("mean"),
    "ReduceMin": _reduce("min"),
    "ReduceSum": _reduce("sum"),
    "Relu": _relu,
    "Round": _unary("round"),
    "Sigmoid": _unary("sigmoid"),
    "Sign": _unary("sign"),
    "Sin": _unary("sin"),
    "Softmax": _softmax,
    "Softplus": _softplus,
    "Sqrt": _unary("sqrt"),
    "Sub": _binary("subtract"),
    "Swish": _swish,
    "Tanh": _unary("tanh"),
    "Where": _where,
    "Xor": _binary("logical_xor"),
}
