"""What a change did to a graph: the nodes that went, came and changed, as text with neighbours."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.program import Program

_SMALL_BYTES: Final = 1 << 16  # constants that are told apart by what they hold
_SHOWN: Final = 24  # lines of a neighbourhood


@dataclass(frozen=True)
class Difference:
    """What one change did.

    Args:
        removed: Nodes that are no longer there, by name.
        added: Nodes that were not there before.
        changed: Nodes of another operator, with other attributes or other constants.
        rewired: Nodes that read other values.
        before: The text of all of them and their neighbours before the change.
        after: The same after it.
    """

    removed: tuple[str, ...]
    added: tuple[str, ...]
    changed: tuple[str, ...]
    rewired: tuple[str, ...]
    before: str
    after: str

    @property
    def nodes(self) -> tuple[str, ...]:
        """Those that say best where it is, the best of them last.

        A node that changed; else the end of what was replaced; else what reads other values now.
        """
        return self.changed or self.removed or self.rewired or self.added

    @property
    def touched_before(self) -> set[str]:
        """The nodes of the graph before the change that it concerns."""
        return {*self.removed, *self.changed, *self.rewired}


def difference(before: Program, after: Program) -> Difference:
    """Return what differs between two states of one Program, nodes matched by name."""
    old, new = ({str(n.name): n for n in of.graph} for of in (before, after))
    both = [name for name in old if name in new and _key(old[name]) != _key(new[name])]
    changed = tuple(name for name in both if _is_other(old[name], new[name]))
    rewired = tuple(name for name in both if name not in changed)
    removed = tuple(name for name in old if name not in new)
    added = tuple(name for name in new if name not in old)
    return Difference(
        removed,
        added,
        changed,
        rewired,
        _text(before, {*removed, *changed, *rewired}),
        _text(after, {*added, *changed, *rewired}),
    )


def fingerprint(program: Program) -> str:
    """Return a digest of a Program's text: nodes, constants by what they are, inputs, outputs."""
    found = hashlib.sha256(repr(program.signatures).encode())
    for model in program.components.values():
        for value in (*model.graph.inputs, *model.graph.outputs):
            found.update(f"{value.name} {value.dtype} {value.shape}\n".encode())
        for node in model.graph:
            found.update(repr(_key(node)).encode())
    return found.hexdigest()


def neighbourhood(names: Collection[str], program: Program, hops: int) -> list[ir.Node]:
    """Return the named nodes and those that at most ``hops`` edges lead to, in graph order."""
    found = {node for node in program.graph if node.name in names}
    for _ in range(hops):
        makers = {value.producer() for node in found for value in node.inputs if value is not None}
        readers = {reader for node in found for out in node.outputs for reader in g.users(out)}
        found |= {node for node in makers | readers if node is not None}
    return [node for node in program.graph if node in found]


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


def _text(program: Program, names: set[str]) -> str:
    """Return the named nodes, each line marked, between their neighbours, and their constants."""
    nodes = neighbourhood(names, program, 1)
    lines = [f"{'>' if node.name in names else ' '} {node_text(node)}" for node in nodes]
    shown = _shortened(lines)
    marked = [node for node in nodes if node.name in names]
    return "\n".join([*shown, *_constants(marked)])


def _shortened(lines: Sequence[str]) -> list[str]:
    """Return at most so many lines that a person reads them, marked ones first."""
    if len(lines) <= _SHOWN:
        return list(lines)
    kept = [line for line in lines if line.startswith(">")][:_SHOWN]
    return [*kept, f"  … {len(lines) - len(kept)} more"]


def _constants(nodes: Iterable[ir.Node]) -> list[str]:
    """Return a line for each constant that nodes read: what it holds, or what it is made from."""
    read = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None)
    found = [(value, g.weight(value)) for value in read]
    lines = [f"  {v.name} = {_described(tensor)}" for v, tensor in found if tensor is not None]
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


def _is_other(old: ir.Node, new: ir.Node) -> bool:
    """Whether a node changed itself, and does not only read what others make."""
    if _own(old) != _own(new):
        return True
    pairs = zip(old.inputs, new.inputs, strict=False)
    return any(
        g.weight(a) is not None and g.weight(b) is not None and _constant(a) != _constant(b)
        for a, b in pairs
    )


def _own(node: ir.Node) -> tuple[Any, ...]:
    attributes = sorted((name, _attribute(a)) for name, a in node.attributes.items())
    return node.domain, node.op_type, attributes


def _key(node: ir.Node) -> tuple[Any, ...]:
    """Return what two nodes share only if they are the same on the same values."""
    reads = [None if v is None else (v.name, _constant(v)) for v in node.inputs]
    return *_own(node), reads, [value.name for value in node.outputs]


def _constant(value: ir.Value | None) -> object:
    tensor = g.weight(value)
    return None if tensor is None else _held(tensor)


def _held(tensor: ir.TensorProtocol) -> object:
    """Return what tells a tensor from others: how it is made, what it holds, or which it is."""
    if isinstance(tensor, weights.Derived | weights.Leaf) or tensor.nbytes > _SMALL_BYTES:
        return weights.identity(tensor)
    return hashlib.sha256(tensor.tobytes()).hexdigest()


def _attribute(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        return f"tensor {_held(attribute.value)}"
    return str(attribute.value)
