"""Digests of what a graph computes: of weights, of nodes by what feeds them and by who reads them.

Names are left out of every digest, and so is the order of nodes, of the operands of commutative
operators, and attributes that say what is the default anyway.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir

from llmopt.ir import weights
from llmopt.ir.match import COMMUTATIVE
from llmopt.ir.program import Program

Digest = Callable[[ir.TensorProtocol], str]
_SMALL_BYTES: Final = 1 << 16


def content(tensor: ir.TensorProtocol) -> str:
    """Return the digest of a tensor's type, shape and numbers."""
    digest = hashlib.sha256(f"{tensor.dtype.name} {list(tensor.shape.numpy())} ".encode())
    digest.update(tensor.tobytes())
    return digest.hexdigest()


def origin(tensor: ir.TensorProtocol) -> str:
    """Return the digest of how a tensor is made from the source's, without reading large ones.

    Two states of one Program have the same digest only where they have the same numbers.
    """
    if isinstance(tensor, weights.Derived | weights.Leaf) or tensor.nbytes > _SMALL_BYTES:
        return _hashed([repr(weights.identity(tensor))])
    return content(tensor)


def fingerprint(program: Program) -> str:
    """Return the digest of what a Program computes, for another state of the same Program."""
    parts = [repr(program.signatures)]
    for model in program.components.values():
        prints = Fingerprints.of(model, origin)
        edge = (*model.graph.inputs, *model.graph.outputs)
        parts += [f"{value.name} {value.dtype} {value.shape}" for value in edge]
        parts += [repr(sorted(prints.imports.items())), *prints.above.values()]
        parts += [prints.key(value) for value in model.graph.outputs]
    return _hashed(parts)


@dataclass
class Fingerprints:
    """What the nodes and values of one graph are known by.

    Args:
        graph: The graph.
        imports: The versions of the operator sets that it uses.
        digest: The function that gives weights and constants their digest.
        values: Keys of values: equal ones compute the same from the same inputs.
        above: Keys of nodes, by all that feeds them.
        below: Keys of nodes, by all that reads them.
        local: Keys of nodes, by themselves and the weights they read.
    """

    graph: ir.Graph
    imports: Mapping[str, int]
    digest: Digest = content
    values: dict[ir.Value, str] = field(default_factory=dict)
    above: dict[ir.Node, str] = field(default_factory=dict)
    below: dict[ir.Node, str] = field(default_factory=dict)
    local: dict[ir.Node, str] = field(default_factory=dict)
    _digests: dict[ir.Value, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ir.Model, digest: Digest = content) -> Fingerprints:
        """Return the fingerprints of a model's graph; every weight is digested once."""
        prints = cls(model.graph, dict(model.graph.opset_imports), digest)
        for value in model.graph.inputs:
            prints.values[value] = f"input {value.name}"
        prints._downwards(model.graph)
        prints._upwards()
        return prints

    @property
    def nodes(self) -> list[ir.Node]:
        """Every node but those that only hold a constant, in order."""
        return list(self.above)

    def digest_of(self, value: ir.Value | None) -> str | None:
        """Return the digest of a weight or constant; None for an input or a result."""
        if value is None or value.is_graph_input():
            return None
        if value not in self._digests:
            tensor = ir.convenience.get_const_tensor(value)
            if tensor is None:
                return None
            self._digests[value] = self.digest(tensor)
        return self._digests[value]

    def attributes(self, node: ir.Node) -> dict[str, str]:
        """Return the attributes of a node as text, but those that say the default."""
        usual = _defaults(node.op_type, node.domain, self.imports.get(node.domain, 1))
        texts = {name: self._attribute(attr) for name, attr in sorted(node.attributes.items())}
        return {name: text for name, text in texts.items() if usual.get(name) != text}

    def _attribute(self, attr: ir.Attr) -> str:
        if attr.type is ir.AttributeType.GRAPH:
            return self._subgraph(attr.as_graph())
        if attr.type is ir.AttributeType.GRAPHS:
            return " ".join(self._subgraph(graph) for graph in attr.as_graphs())
        if attr.type is ir.AttributeType.TENSOR:
            return self.digest(attr.as_tensor())
        return spelled(attr.value)

    def _subgraph(self, graph: ir.Graph) -> str:
        for index, value in enumerate(graph.inputs):
            self.values[value] = f"inner {index}"
        inner = Fingerprints(graph, self.imports, self.digest, values=self.values)
        inner._downwards(graph)
        return _hashed([self.key(value) for value in graph.outputs])

    def _downwards(self, graph: ir.Graph) -> None:
        for node in graph:
            if node.op_type == "Constant" and node.domain == "":
                continue
            spelling = f"{node.domain}.{node.op_type} {self.attributes(node)} {len(node.outputs)}"
            keys = [self.key(value) for value in _operands(node)]
            digests = [str(self.digest_of(value)) for value in _operands(node)]
            if node.op_type in COMMUTATIVE and len(keys) == 2:
                keys, digests = sorted(keys), sorted(digests)
            self.local[node] = _hashed([spelling, *digests])
            self.above[node] = _hashed([spelling, *keys])
            for index, value in enumerate(node.outputs):
                self.values[value] = f"{self.above[node]} {index}"

    def key(self, value: ir.Value | None) -> str:
        """Return the key of a value: the digest of a constant, else by what feeds it."""
        if value is None:
            return ""
        return self.digest_of(value) or self.values.get(value, f"outer {value.name}")

    def _upwards(self) -> None:
        for node in reversed(self.nodes):
            reads = []
            for index, value in enumerate(node.outputs):
                reads += [f"{index} {self._read(use.node, use.idx)}" for use in value.uses()]
                if value.is_graph_output():
                    reads.append(f"{index} output {value.name}")
            self.below[node] = _hashed([self.local[node], *sorted(reads)])

    def _read(self, node: ir.Node, index: int) -> str:
        operand = 0 if node.op_type in COMMUTATIVE else index
        return f"{self.below.get(node, 'inner')} {operand}"


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


def _operands(node: ir.Node) -> list[ir.Value | None]:
    """Return the inputs of a node, without those at the end that are left out."""
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs


def _hashed(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
