"""How much memory the results between a lowered Program's operators take, by plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.ir.program import Program

_TOKENS: Final = 128


def activation_bytes(program: Program) -> int:
    """Return the most bytes of results alive at once in any component; see ``_of_one``."""
    return max(_of_one(part) for part in program.parts())


def _of_one(program: Program) -> int:
    """Return the most bytes of results alive at once, for one prompt of 128 tokens.

    A result lives from the operator that makes it to the last that reads it, in the order of the
    graph; nothing is written in place. A backend may need less, and never much more: a pass that
    leaves a larger result around raises it in every backend.
    """
    tokens = min(_TOKENS, program.facts.max_length or _TOKENS)
    sizes = {"B": 1, "S": tokens, "T": tokens, "P": 0, "K": 1}
    last = _last_reads(program.graph)
    alive: dict[ir.Value, int] = {}
    bytes_of: dict[ir.Value, int] = {}
    most = 0
    for place, node in enumerate(program.graph):
        inputs = [value for value in node.inputs if value is not None]
        largest = max((bytes_of.get(value, 0) for value in inputs), default=0)
        for value in node.outputs:
            if value.uses() or value.is_graph_output():
                bytes_of[value] = alive[value] = _bytes(value, sizes, largest)
        most = max(most, sum(alive.values()))
        for value in [value for value in alive if last[value] <= place]:
            del alive[value]
    return most


def _last_reads(graph: ir.Graph) -> dict[ir.Value, int]:
    """Return the place of the last operator that reads each value; outputs live to the end."""
    last: dict[ir.Value, int] = {}
    for place, node in enumerate(graph):
        last |= dict.fromkeys(node.outputs, place)
        last |= {value: place for value in node.inputs if value is not None}
    end = len(graph)
    return last | dict.fromkeys(graph.outputs, end)


def _bytes(value: ir.Value, sizes: Mapping[str, int], fallback: int) -> int:
    """Return the bytes of a value; of one whose shape is not known, those of the largest input."""
    shape = g.shape(value)
    numbers = [sizes.get(size) if isinstance(size, str) else size for size in shape or ["?"]]
    if shape is None or None in numbers:
        return fallback
    width = 4 if value.dtype is None else value.dtype.itemsize
    return math.ceil(math.prod(n for n in numbers if n is not None) * width)
