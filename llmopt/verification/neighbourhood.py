"""Nodes of a graph and their neighbours, and the text of them that people read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.difference import Difference
from llmopt.ir.fingerprints import origin
from llmopt.ir.program import Program

_LINES: Final = 24  # of a neighbourhood


def neighbourhood(names: Collection[str], program: Program, hops: int) -> list[ir.Node]:
    """Return the named nodes and those that at most ``hops`` edges lead to, in graph order."""
    nodes = {node for node in program.graph if node.name in names}
    for _ in range(hops):
        makers = {value.producer() for node in nodes for value in node.inputs if value is not None}
        readers = {reader for node in nodes for out in node.outputs for reader in g.users(out)}
        nodes |= {node for node in makers | readers if node is not None}
    return [node for node in program.graph if node in nodes]


def rewired(change: Difference, before: Program, after: Program) -> tuple[str, ...]:
    """Return the nodes that stayed and read what was removed before, or what was added after."""
    readers = _readers(change.nodes("removed"), before) & _names(after)
    readers |= _readers(change.nodes("added"), after) & _names(before)
    stayed = readers - change.nodes_before - change.nodes_after
    return tuple(name for name in map(_name, after.graph) if name in stayed)


def _readers(names: Collection[str], program: Program) -> set[str]:
    outputs = [out for node in program.graph if node.name in names for out in node.outputs]
    return {_name(reader) for out in outputs for reader in g.users(out)}


def _names(program: Program) -> set[str]:
    return {_name(node) for node in program.graph}


def _name(node: ir.Node) -> str:
    return str(node.name)


def node_text(node: ir.Node) -> str:
    """Return a node as ONNX's text form writes it, the shape of its first output behind it."""
    attributes = ", ".join(f"{a.name} = {_attribute(a)}" for a in node.attributes.values())
    outputs = ", ".join(value.name or "_" for value in node.outputs)
    operator = ".".join(filter(None, (node.domain, node.op_type)))
    operands = ", ".join("" if value is None else str(value.name) for value in node.inputs)
    options = f" <{attributes}>" if attributes else ""
    first = node.outputs[0]
    sizes = ",".join(map(str, g.shape(first) or ["?"]))
    kind = "?" if first.dtype is None else first.dtype.name.lower()
    return f"[{node.name}] {outputs} = {operator}{options} ({operands})  # {kind}[{sizes}]"


def marked_text(names: Collection[str], program: Program) -> str:
    """Return the named nodes, each line marked, between their neighbours, and their constants."""
    nodes = neighbourhood(names, program, 1)
    lines = [f"{'>' if node.name in names else ' '} {node_text(node)}" for node in nodes]
    marked = [node for node in nodes if node.name in names]
    return "\n".join([*_shortened(lines), *_constants(marked)])


def _shortened(lines: Sequence[str]) -> list[str]:
    """Return few enough lines that a person reads them, marked ones first."""
    if len(lines) <= _LINES:
        return list(lines)
    kept = [line for line in lines if line.startswith(">")][:_LINES]
    return [*kept, f"  … {len(lines) - len(kept)} more"]


def _constants(nodes: Iterable[ir.Node]) -> list[str]:
    """Return a line for each constant that nodes read: its numbers, or what it is made from."""
    read = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None)
    tensors = [(value, g.weight(value)) for value in read]
    lines = [f"  {v.name} = {_described(tensor)}" for v, tensor in tensors if tensor is not None]
    return _shortened(lines)


def _described(tensor: ir.TensorProtocol) -> str:
    sizes = ",".join(map(str, tensor.shape.numpy()))
    kind = f"{tensor.dtype.name.lower()}[{sizes}]"
    if isinstance(tensor, weights.Derived | weights.Leaf):
        return f"{kind} {_recipe(tensor)}"
    return f"{kind} {tensor.numpy().tolist()}" if tensor.size <= 8 else kind


def _recipe(tensor: ir.TensorProtocol) -> str:
    """Return how a weight is made from the source's tensors."""
    if isinstance(tensor, weights.Leaf):
        return tensor.source
    if isinstance(tensor, weights.Derived):
        return f"{tensor.op}({', '.join(map(_recipe, tensor.parts))})"
    return "a constant"


def _attribute(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        return f"tensor {origin(attribute.as_tensor())}"
    return str(attribute.value)
