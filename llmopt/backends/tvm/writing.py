"""What a rule writes an operator with: the function being written, and facts of expressions.

A rule takes the function and a node, and returns what each output is: an expression of Relax, or
a known value (`sizes`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import onnx_ir as ir

from llmopt.backends.tvm import api
from llmopt.backends.tvm.sizes import Known
from llmopt.errors import UnsupportedModelError
from llmopt.ir import graph as g


class FunctionWriter(Protocol):
    """The function that operators are written into."""

    def tensor(self, value: ir.Value | None) -> Any:
        """Return a value of the graph as an expression of Relax."""

    def known(self, value: ir.Value | None) -> Known | None:
        """Return a value of the graph where it is known while compiling."""

    def emit(self, expression: Any) -> Any:
        """Bind an expression to a variable and return it."""


Rule = Callable[[FunctionWriter, ir.Node], Sequence[Any]]


def shape_of(expression: Any) -> list[Any]:
    """Return the sizes of an expression: numbers where they are, else expressions."""
    return [api.plain(size) for size in expression.ty.shape.values]


def dtype_of(expression: Any) -> str:
    """Return the element type of an expression."""
    return str(expression.ty.dtype.dtype)


def needed(w: FunctionWriter, node: ir.Node, index: int) -> Known:
    """Return an operand that must be known while compiling.

    Raises:
        UnsupportedModelError: it depends on the input's numbers.
    """
    found = w.known(g.optional(node, index))
    if found is None:
        problem = f"{node.op_type} ({node.name!r}) takes sizes that depend on the input's numbers"
        raise UnsupportedModelError("model", [problem], "use --target onnxruntime-cpu")
    return found


def numbers(w: FunctionWriter, node: ir.Node, index: int) -> list[Any]:
    """Return the numbers of an operand that must be known while compiling.

    Raises:
        UnsupportedModelError: it depends on the input's numbers.
    """
    return list(needed(w, node, index).reshape(-1))


def axes_of(w: FunctionWriter, node: ir.Node, rank: int, index: int = 1) -> list[int]:
    """Return the axes that an operand or attribute names; all where neither does."""
    if g.optional(node, index) is not None:
        given = [int(axis) for axis in numbers(w, node, index)]
    else:
        given = list(g.attribute(node, "axes", ()) or range(rank))
    return [axis % rank for axis in given]
