"""Match formulas against a graph.

A pattern is a tree: ``op("Mul", "x", op("Sigmoid", "x"))``. A name stands for a value, the same
one wherever the name occurs; ``const(2.0)`` for a number, ``const("eps")`` for any one number.
The operands of commutative operators match in either order. Matching looks upwards from one
value and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import onnx_ir as ir

from llmopt.ir import graph as g

COMMUTATIVE: Final = frozenset({"Add", "Mul", "And", "Or", "Max", "Min", "Equal"})
RELATIVE_TOLERANCE: Final = 1e-4  # constants such as sqrt(2/pi) are written with few digits
_DEFAULTS: Final = {"keepdims": 1}  # what an attribute is where it is not written

Bound = dict[str, Any]


@dataclass(frozen=True)
class Operator:
    """An operator with these operands and at least these attributes."""

    op_type: str
    operands: tuple[Pattern, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Number:
    """One constant number: this one, or any, bound to a name."""

    value: float | str


@dataclass(frozen=True)
class OneOf:
    """The first of several patterns that matches."""

    options: tuple[Pattern, ...]


Pattern = Operator | Number | OneOf | str


def op(op_type: str, *operands: Pattern, **attributes: Any) -> Operator:
    """Return the pattern of an operator; trailing operands may be left out."""
    return Operator(op_type, operands, attributes)


def const(value: float | str) -> Number:
    """Return the pattern of a constant number: a given one, or any under a name."""
    return Number(value)


def either(*options: Pattern) -> OneOf:
    """Return a pattern that matches where one of ``options`` does."""
    return OneOf(options)


def match(pattern: Pattern, value: ir.Value) -> Bound | None:
    """Return what the names of ``pattern`` stand for, or None if ``value`` is something else.

    Values are bound as ``ir.Value``, numbers as ``float``; ``"root"`` is the matched node.
    """
    return next(matches(pattern, value), None)


def matches(pattern: Pattern, value: ir.Value) -> Iterator[Bound]:
    """Yield every way in which ``value`` is ``pattern``, as ``match`` returns the first."""
    for bound in _match(pattern, value, {}):
        yield {**bound, "root": value.producer()}


def _match(pattern: Pattern, value: ir.Value | None, bound: Bound) -> Iterator[Bound]:
    if value is None:
        return
    if isinstance(pattern, str):
        if bound.get(pattern, value) is value:
            yield {**bound, pattern: value}
    elif isinstance(pattern, Number):
        yield from _number(pattern, value, bound)
    elif isinstance(pattern, OneOf):
        for option in pattern.options:
            yield from _match(option, value, bound)
    else:
        yield from _operator(pattern, value, bound)


def _number(pattern: Number, value: ir.Value, bound: Bound) -> Iterator[Bound]:
    found = g.scalar(value)
    if found is None:
        return
    if isinstance(pattern.value, str):
        if bound.get(pattern.value, found) == found:
            yield {**bound, pattern.value: found}
    elif math.isclose(found, pattern.value, rel_tol=RELATIVE_TOLERANCE):
        yield bound


def _operator(pattern: Operator, value: ir.Value, bound: Bound) -> Iterator[Bound]:
    node = g.producer(value, pattern.op_type)
    if node is None or value is not node.outputs[0] or len(node.inputs) < len(pattern.operands):
        return
    wanted = pattern.attributes.items()
    if any(g.attribute(node, name, _DEFAULTS.get(name)) != value for name, value in wanted):
        return
    yield from _operands(pattern.operands, list(node.inputs), bound)
    if pattern.op_type in COMMUTATIVE and len(pattern.operands) == 2:
        yield from _operands(pattern.operands, list(node.inputs)[::-1], bound)


def _operands(
    patterns: tuple[Pattern, ...], values: list[ir.Value | None], bound: Bound
) -> Iterator[Bound]:
    if not patterns:
        yield bound
        return
    for partial in _match(patterns[0], values[0], bound):
        yield from _operands(patterns[1:], values[1:], partial)
