"""What numbers a graph's values hold: their element types, found from operators' schemas.

A pass that adds nodes need not say what they give; whoever must know for every value asks here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.ir.dialect import OPSET


@dataclass(frozen=True)
class Formals:
    """The types that an operator's schema names.

    Args:
        inputs: Type of each formal input, ``"tensor(int64)"``, or a letter for one of several.
        outputs: Type of each formal output.
        allowed: The types that each letter may stand for.
        variadic: Whether the last input may come any number of times.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    allowed: Mapping[str, frozenset[str]] = field(default_factory=dict)
    variadic: bool = False

    def input(self, index: int) -> str:
        """Return the type of input ``index``, empty where the schema has none."""
        if self.variadic:
            index = min(index, len(self.inputs) - 1)
        return self.inputs[index] if index < len(self.inputs) else ""

    def output(self, index: int) -> str:
        """Return the type of output ``index``; the last one may come any number of times."""
        return self.outputs[min(index, len(self.outputs) - 1)] if self.outputs else ""

    def takes(self, name: str, dtype: ir.DataType) -> bool:
        """Whether ``name``, a letter or a type, may be ``dtype``."""
        return spelled(dtype) in self.allowed.get(name, frozenset({name}))


Schemas = Callable[[ir.Node], Formals | None]
Types = dict[ir.Value, ir.DataType]


def spelled(dtype: ir.DataType) -> str:
    """Return a type as schemas write it.

    >>> spelled(ir.DataType.FLOAT16), spelled(ir.DataType.INT64)
    ('tensor(float16)', 'tensor(int64)')
    """
    return f"tensor({dtype.name.lower()})"


def standard(node: ir.Node) -> Formals | None:
    """Return the types of a standard operator, None for one of another domain."""
    return _standard(node.op_type) if node.domain == "" else None


@lru_cache(maxsize=512)
def _standard(op_type: str) -> Formals | None:
    import onnx

    if not onnx.defs.has(op_type, ""):
        return None
    schema = onnx.defs.get_schema(op_type, OPSET, "")
    variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
    return Formals(
        tuple(formal.type_str for formal in schema.inputs),
        tuple(formal.type_str for formal in schema.outputs),
        {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints},
        bool(schema.inputs) and schema.inputs[-1].option == variadic,
    )


def element_types(graph: ir.Graph, schemas: Schemas = standard) -> Types:
    """Return the element type of every value whose type can be inferred.

    Args:
        graph: A graph with its nodes in topological order.
        schemas: Gives the types of an operator; of the standard ones, if not given.
    """
    roots = (*graph.inputs, *graph.initializers.values())
    types = {value: value.dtype for value in roots if value.dtype is not None}
    for node in graph:
        formals = schemas(node) or Formals((), ())
        bound: dict[str, ir.DataType] = {}
        for index, value in enumerate(node.inputs):
            if value is not None and value in types:
                bound.setdefault(formals.input(index), types[value])
        for index, out in enumerate(node.outputs):
            name = formals.output(index)
            found = out.dtype or _stated(node, types) or bound.get(name) or _only(formals, name)
            if found is not None:
                types[out] = found
    return types


def _stated(node: ir.Node, types: Types) -> ir.DataType | None:
    """Return what a node says of its output's type, by an attribute or by another operand."""
    for name in ("to", "output_dtype", "dtype"):
        if code := g.attribute(node, name, 0):
            return ir.DataType(code)
    if (value := g.attribute(node, "value", None)) is not None and node.op_type in _BY_VALUE:
        dtype: ir.DataType = value.dtype
        return dtype
    position = _BY_OPERAND.get(node.op_type)
    operand = None if position is None else g.optional(node, position)
    return types.get(operand) if operand is not None else None


_BY_VALUE: Final = frozenset({"Constant", "ConstantOfShape"})
_BY_OPERAND: Final = {"CastLike": 1, "DequantizeLinear": 1, "QuantizeLinear": 2}


def _only(formals: Formals, name: str) -> ir.DataType | None:
    """Return the type that ``name`` must be, if it can be no other."""
    allowed: Sequence[str] = sorted(formals.allowed.get(name, frozenset({name})))
    if len(allowed) != 1 or not allowed[0].startswith("tensor("):
        return None
    word = allowed[0].removeprefix("tensor(").removesuffix(")").upper()
    return ir.DataType[word] if word in ir.DataType.__members__ else None
