"""Arithmetic on sizes while compiling: what a graph computes from shapes needs no code.

A value of integers is *known* where each is a number or an expression of the symbols B, S, T.
Known values are numpy arrays of Python objects, of rank 0 or 1, so that numpy does the indexing
and TVM's expressions the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llmopt.backends.tvm import api
from llmopt.ir import graph as g

Known = npt.NDArray[np.object_]
LONGEST: Final = 64
"""A longer list of integers is data, not sizes."""
_END: Final = 1 << 31  # a slice to the end ends at a number beyond this


def known(values: Any) -> Known:
    """Return numbers or expressions as a known value; a sequence becomes rank 1."""
    if isinstance(values, Sequence | np.ndarray):
        result = np.empty(len(values), object)
        for index, value in enumerate(values):
            result[index] = _plain(value)
        return result
    scalar = np.empty((), object)
    scalar[()] = _plain(values)
    return scalar


def constant(value: ir.Value | None) -> Known | None:
    """Return the integers that an initializer holds, if it is short."""
    array = g.constant(value, LONGEST)
    if array is None or array.dtype.kind not in "iub" or array.ndim > 1:
        return None
    return known(array.item() if array.ndim == 0 else array.tolist())


def evaluate(node: ir.Node, operands: Sequence[Known | None]) -> Known | None:
    """Return what ``node`` computes from known operands, None if that is not known."""
    rule = RULES.get(node.op_type)
    if rule is None or node.domain or any(operand is None for operand in operands):
        return None
    result = rule(node, [operand for operand in operands if operand is not None])
    return None if result is None else _simplified(result)


def bounds(size: Any, start: Any, end: Any) -> tuple[Any, Any]:
    """Return the bounds of a slice of an axis of ``size``, counted from its start.

    A bound that is an expression is taken as it is: only its own graph can say that it fits.
    """
    return _bound(size, start), _bound(size, end)


def _bound(size: Any, at: Any) -> Any:
    if not isinstance(at, int):
        return at
    if at >= _END:
        return size
    if at < 0:
        return api.simplify(size + at) if at > -_END else 0
    return min(at, size) if isinstance(size, int) else at


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, int | np.integer | np.bool_) else value


def _simplified(values: Known) -> Known:
    flat = [api.simplify(value) for value in values.reshape(-1)]
    return known(flat) if values.ndim else known(flat[0])


Rule = Callable[[ir.Node, list[Known]], Known | None]


def _binary(compute: Callable[[Any, Any], Any]) -> Rule:
    def rule(_: ir.Node, operands: list[Known]) -> Known | None:
        left, right = operands
        return np.asarray(compute(left, right), object)

    return rule


def _gather(_: ir.Node, operands: list[Known]) -> Known | None:
    data, index = operands
    if data.ndim != 1 or not all(isinstance(i, int) for i in index.reshape(-1)):
        return None
    return np.asarray(data[index.astype(np.int64)], object)


def _slice(_: ir.Node, operands: list[Known]) -> Known | None:
    data, *rest = operands
    numbers = [list(part.reshape(-1)) for part in rest]
    if not all(isinstance(item, int) for part in numbers for item in part):
        return None
    start, end = numbers[0][0], numbers[1][0]
    step = numbers[3][0] if len(numbers) > 3 else 1
    return data[start:end:step]


def _squeeze(_: ir.Node, operands: list[Known]) -> Known | None:
    return operands[0].reshape(()) if operands[0].size == 1 else operands[0]


def _unsqueeze(_: ir.Node, operands: list[Known]) -> Known | None:
    return operands[0].reshape(1) if operands[0].ndim == 0 else None


def _reshape(_: ir.Node, operands: list[Known]) -> Known | None:
    data, target = operands
    if target.size > 1:
        return None
    return data.reshape(()) if target.size == 0 else data.reshape(-1)


def _concat(_: ir.Node, operands: list[Known]) -> Known | None:
    return np.concatenate([operand.reshape(-1) for operand in operands])


def _cast(node: ir.Node, operands: list[Known]) -> Known | None:
    integers = {ir.DataType.INT64, ir.DataType.INT32}
    return operands[0] if ir.DataType(g.attribute(node, "to", 0)) in integers else None


RULES: Final[Mapping[str, Rule]] = {
    "Add": _binary(lambda a, b: a + b),
    "Cast": _cast,
    "Concat": _concat,
    "Div": _binary(lambda a, b: a // b),
    "Gather": _gather,
    "Identity": lambda _, operands: operands[0],
    "Mul": _binary(lambda a, b: a * b),
    "Neg": lambda _, operands: np.asarray(-operands[0], object),
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _binary(lambda a, b: a - b),
    "Unsqueeze": _unsqueeze,
}
