"""Names of the glossary for the free dimensions of a traced graph."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from llmopt.ir import graph as g

_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_TOTALS = ("P + S", "S + P")


def name_dims(graph: ir.Graph, inputs: Mapping[str, Sequence[int | str]]) -> None:
    """Rename the symbols in ``graph`` to the names of the inputs' dimensions.

    Args:
        graph: The graph; its inputs carry the exporter's symbols.
        inputs: Input name to dimension names: ``{"input_ids": ("B", "S")}``.
    """
    names: dict[str, str] = {}
    for value in graph.inputs:
        for symbol, name in zip(
            g.shape(value) or [], inputs.get(str(value.name), ()), strict=False
        ):
            if isinstance(symbol, str) and isinstance(name, str):
                names.setdefault(symbol, name)
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _values(graph: ir.Graph) -> list[ir.Value]:
    outputs = [value for node in graph for value in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *outputs]


def _renamed(dim: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    if dim.value is None:
        return None
    text = _SYMBOL.sub(lambda m: names.get(m[0], m[0]), str(dim.value))
    return "T" if text in _TOTALS else text
