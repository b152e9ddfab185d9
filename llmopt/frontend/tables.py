"""Longest sequence of a model: the smallest table that positions are looked up in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir.feeds import Case, feeds
from llmopt.ir.probe import Probe
from llmopt.ir.program import Program


def longest(program: Program, vocabulary: int) -> int | None:
    """Return the longest sequence in tokens, or None where no table limits it.

    Each lookup in a fixed table is evaluated for two lengths of the same token repeated: where
    the highest index grows by one per token, it is a position.
    """
    return min(_limits(program, vocabulary), default=None)


def _limits(program: Program, vocabulary: int) -> Iterator[int]:
    for node in g.nodes(program.graph, "Gather"):
        rows, index = g.static(node.inputs[0], 0), g.operand(node, 1)
        fixed = g.weight(node.inputs[0]) is not None and g.attribute(node, "axis", 0) == 0
        if not fixed or not rows or (index.is_graph_input() and _is_token(program, index)):
            continue
        highest = [_highest(program, index, length, vocabulary) for length in (5, 6)]
        if highest[0] is not None and highest[1] == highest[0] + 1:
            yield rows - (highest[0] - 4)


def _is_token(program: Program, value: ir.Value) -> bool:
    return any(p.name == value.name and p.role == Role.TOKENS for p in program.signature.inputs)


def _highest(program: Program, index: ir.Value, tokens: int, vocabulary: int) -> int | None:
    """Return the highest index looked up for ``tokens`` equal tokens, if it is known."""
    probe = Probe(program, [index])
    if probe.obstacle() is not None:
        return None
    sizes = {"B": 2, "S": tokens, "P": 0, "T": tokens}
    arrays = feeds(program.signature, Case(2, tokens), max(vocabulary, 2), probe.reads())
    same = {
        port.name: np.full_like(arrays[port.name], 2)
        for port in program.signature.inputs
        if port.role == Role.TOKENS and port.name in arrays
    }
    (indices,) = probe.run({**arrays, **same}, sizes)
    return int(indices.max()) if indices.size and indices.dtype.kind == "i" else None
