"""Digests of what a graph computes: of weights, of nodes by what feeds them and by who reads them.

Names are left out of every digest, and so is the order of nodes, of the operands of commutative
operators, and attributes that say what is the default anyway.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from llmopt.ir.match import COMMUTATIVE


@dataclass
class Fingerprints:
    """What the nodes and values of one graph are known by.

    Args:
        graph: The graph.
        imports: The versions of the operator sets that it uses.
        values: Of every value: equal ones compute the same from the same inputs.
        above: Of every node, by all that feeds it.
        below: Of every node, by all that reads it.
        local: Of every node, by itself and the weights it reads.
    """

    graph: ir.Graph
    imports: Mapping[str, int]
    values: dict[ir.Value, str] = field(default_factory=dict)
    above: dict[ir.Node, str] = field(default_factory=dict)
    below: dict[ir.Node, str] = field(default_factory=dict)
    local: dict[ir.Node, str] = field(default_factory=dict)
    _spelled: dict[ir.Node, str] = field(default_factory=dict)
    _held: dict[ir.Value, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ir.Model) -> Fingerprints:
        """Return the fingerprints of a model's graph; every weight is read once."""
        made = cls(model.graph, dict(model.graph.opset_imports))
        for value in model.graph.inputs:
            made.values[value] = f"input {value.name}"
        made._downwards(model.graph)
        made._upwards()
        return made

    @property
    def nodes(self) -> list[ir.Node]:
        """Every node but those that only hold a constant, in order."""
        return list(self.above)

    def held(self, value: ir.Value | None) -> str | None:
        """Return the digest of a weight or constant; None for what is computed or given."""
        if value is None or value.is_graph_input():
            return None
        if value not in self._held:
            tensor = ir.convenience.get_const_tensor(value)
            if tensor is None:
                return None
            self._held[value] = digest(tensor)
        return self._held[value]

    def attributes(self, node: ir.Node) -> dict[str, str]:
        """Return the attributes of a node as text, but those that say the default."""
        usual = _defaults(node.op_type, node.domain, self.imports.get(node.domain, 1))
        found = {name: self._attribute(attr) for name, attr in sorted(node.attributes.items())}
        return {name: text for name, text in found.items() if usual.get(name) != text}

    def _attribute(self, attr: ir.Attr) -> str:
        if attr.type is ir.AttributeType.GRAPH:
            return self._subgraph(attr.as_graph())
        if attr.type is ir.AttributeType.GRAPHS:
            return " ".join(self._subgraph(graph) for graph in attr.as_graphs())
        if attr.type is ir.AttributeType.TENSOR:
            return digest(attr.as_tensor())
        return spelled(attr.value)

    def _subgraph(self, graph: ir.Graph) -> str:
        for index, value in enumerate(graph.inputs):
            self.values[value] = f"inner {index}"
        inner = Fingerprints(graph, self.imports, values=self.values)
        inner._downwards(graph)
        return _hashed([self._key(value) for value in graph.outputs])

    def _downwards(self, graph: ir.Graph) -> None:
        for node in graph:
            if node.op_type == "Constant" and node.domain == "":
                continue
            spelling = f"{node.domain}.{node.op_type} {self.attributes(node)} {len(node.outputs)}"
            self._spelled[node] = spelling
            keys = [self._key(value) for value in _given(node)]
            held = [str(self.held(value)) for value in _given(node)]
            if node.op_type in COMMUTATIVE and len(keys) == 2:
                keys, held = sorted(keys), sorted(held)
            self.local[node] = _hashed([spelling, *held])
            self.above[node] = _hashed([spelling, *keys])
            for index, value in enumerate(node.outputs):
                self.values[value] = f"{self.above[node]} {index}"

    def _key(self, value: ir.Value | None) -> str:
        if value is None:
            return ""
        return self.held(value) or self.values.get(value, f"outer {value.name}")

    def _upwards(self) -> None:
        for node in reversed(self.nodes):
            reads = []
            for index, value in enumerate(node.outputs):
                reads += [f"{index} {self._read(use.node, use.idx)}" for use in value.uses()]
                if value.is_graph_output():
                    reads.append(f"{index} output {value.name}")
            self.below[node] = _hashed([self.local[node], *sorted(reads)])

    def _read(self, node: ir.Node, index: int) -> str:
        place = 0 if node.op_type in COMMUTATIVE else index
        return f"{self.below.get(node, 'inner')} {place}"


def digest(tensor: ir.TensorProtocol) -> str:
    """Return the digest of a tensor's type, shape and numbers."""
    found = hashlib.sha256(f"{tensor.dtype.name} {list(tensor.shape.numpy())} ".encode())
    found.update(tensor.tobytes())
    return found.hexdigest()


def spelled(value: Any) -> str:
    """Return the value of an attribute as text; numbers as float32 has them.

    >>> spelled(1e-5), spelled(np.float32(1e-5)), spelled((0, 1)), spelled(b"linear")
    ('1e-05', '1e-05', '[0, 1]', 'linear')
    """
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, float | np.floating):
        return str(np.float32(value))
    if isinstance(value, list | tuple):
        return f"[{', '.join(spelled(each) for each in value)}]"
    return str(value)


@functools.cache
def _defaults(op_type: str, domain: str, version: int) -> dict[str, str]:
    """Return what the attributes of an operator are where they are not written."""
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return {}
    given = {
        name: attribute.default_value
        for name, attribute in schema.attributes.items()
        if attribute.default_value.name
    }
    return {n: spelled(onnx.helper.get_attribute_value(value)) for n, value in given.items()}


def _given(node: ir.Node) -> list[ir.Value | None]:
    """Return the inputs of a node, without those at the end that are left out."""
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs


def _hashed(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
