"""Evaluate parts of a graph on chosen inputs, to learn what they compute.

Masks and position tables are spelled in countless ways. What they *are* shows when they are
evaluated: a mask that is "not padding, not later than the query" on every probe is that mask,
however many Range, GatherND and Where nodes it took. Only nodes that depend on positions,
padding and sizes are evaluated; a size of an activation is taken from its symbolic shape, so no
weight and no layer is ever run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.ir.feeds import known, resolve
from llmopt.ir.program import Program

Sizes = Mapping[str, int]


class Probe:
    """A part of a graph, ready to be evaluated.

    Args:
        program: Program that holds the values.
        values: Values to evaluate.
    """

    def __init__(self, program: Program, values: Sequence[ir.Value]) -> None:
        self.values = list(values)
        cut = _cut(values)
        self.shapes = [n.outputs[0] for n in cut if n.op_type in ("Shape", "Size")]
        self.nodes = [n for n in cut if n.op_type not in ("Shape", "Size")]
        self.inputs = _outer(self.nodes, self.values, self.shapes)
        self.program = program

    def reads(self) -> set[str]:
        """Return the names of graph inputs whose *contents* matter, not only their sizes."""
        return {str(v.name) for v in self.inputs if v.is_graph_input()}

    def obstacle(self) -> str | None:
        """Return why this cannot be evaluated, or None: it reads a weight or an activation."""
        for value in self.inputs:
            if not value.is_graph_input() and value.const_value is None:
                return f"it depends on {value.name!r}"
        for node in self.nodes:
            if node.domain != "" or "Random" in node.op_type or _has_graph(node):
                return f"{node.op_type} {node.name!r} cannot be evaluated ahead"
        for value in self.shapes:
            made_by = value.producer()
            dims = g.shape(made_by.inputs[0]) if made_by is not None else None
            if dims is None or not all(known(d, _SYMBOLS) for d in dims):
                return f"a size of {value.name!r} is unknown"
        return None

    def attempt(self, feeds: Mapping[str, npt.NDArray[Any]], sizes: Sizes) -> list[Any] | str:
        """Return what ``run`` does, or why it cannot be computed for these sizes."""
        try:
            return self.run(feeds, sizes)
        except _FAILURES as error:
            return f"it cannot be evaluated for {dict(sizes)}: {error}"

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], sizes: Sizes) -> list[npt.NDArray[Any]]:
        """Return the values for these inputs.

        Args:
            feeds: Graph inputs by name; more than needed is fine.
            sizes: Sizes of B, S, P and T.
        """
        import onnx
        from onnx.reference import ReferenceEvaluator

        from llmopt.ir.evaluator_ops import CORRECTED

        given = {str(v.name): feeds[str(v.name)] for v in self.inputs if v.is_graph_input()}
        given |= {str(v.name): _size(v, sizes) for v in self.shapes}
        tensors = [
            ir.serde.serialize_tensor(v.const_value)
            for v in self.inputs
            if v.const_value is not None and not v.is_graph_input()
        ]
        for tensor, value in zip(
            tensors, [v for v in self.inputs if str(v.name) not in given], strict=True
        ):
            tensor.name = str(value.name)
        graph = onnx.helper.make_graph(
            [ir.serde.serialize_node(node) for node in self.nodes],
            "probe",
            [onnx.helper.make_value_info(n, onnx.TypeProto()) for n in given],
            [onnx.helper.make_value_info(str(v.name), onnx.TypeProto()) for v in self.values],
            tensors,
        )
        opset = self.program.graph.opset_imports[""]
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10
        )
        with np.errstate(all="ignore"):  # infinities are what masks are made of
            results = ReferenceEvaluator(model, new_ops=list(CORRECTED)).run(None, given)
        return [np.asarray(result) for result in results]


# What numpy raises, and onnx's evaluator in its name, where sizes do not go together.
_FAILURES = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)
_SYMBOLS = {"B": 2, "S": 3, "P": 4, "T": 7, "I": 2}


def _cut(values: Sequence[ir.Value]) -> list[ir.Node]:
    """Return ancestors in topological order, not looking past a Shape or Size."""
    order: dict[ir.Node, None] = {}
    stack = [(value, False) for value in values]
    seen: set[ir.Value] = set()
    while stack:
        value, done = stack.pop()
        node = value.producer()
        if node is None or (value in seen and not done):
            continue
        if done or node.op_type in ("Shape", "Size"):
            order[node] = None
            continue
        seen.add(value)
        stack.append((value, True))
        stack.extend((v, False) for v in node.inputs if v is not None)
    return list(order)


def _outer(
    nodes: Sequence[ir.Node], values: Sequence[ir.Value], computed: Sequence[ir.Value]
) -> list[ir.Value]:
    inner = {v for node in nodes for v in node.outputs} | set(computed)
    read = [v for node in nodes for v in node.inputs if v is not None] + list(values)
    return [v for v in dict.fromkeys(read) if v not in inner]


def _has_graph(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attr.type in kinds for attr in node.attributes.values())


def _size(value: ir.Value, sizes: Sizes) -> npt.NDArray[np.int64]:
    node = value.producer()
    assert node is not None
    dims = [resolve(dim, sizes) for dim in g.shape(node.inputs[0]) or []]
    if node.op_type == "Size":
        return np.asarray(np.prod(dims), np.int64)
    start, end = g.attribute(node, "start", 0), g.attribute(node, "end", len(dims))
    return np.asarray(dims[start:end], np.int64)
