"""Small questions about onnx_ir graphs, and the edits that every pass makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Dim = int | str


def nodes(graph: ir.Graph, *op_types: str, domain: str = "") -> list[ir.Node]:
    """Return the nodes of these operators, in order; a list, so that editing is safe."""
    return [n for n in graph if n.op_type in op_types and n.domain == domain]


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether ``node`` is one of the standard ONNX operators ``op_types``."""
    return node is not None and node.op_type in op_types and node.domain == ""


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that makes ``value``, if it is one of ``op_types`` (or any, if none)."""
    node = value.producer() if value is not None else None
    return node if node is not None and (not op_types or is_op(node, *op_types)) else None


def operand(node: ir.Node, index: int) -> ir.Value:
    """Return an input that the operator's schema says is there."""
    value = node.inputs[index]
    assert value is not None
    return value


def optional(node: ir.Node, index: int) -> ir.Value | None:
    """Return an input, or None where it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def users(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read ``value``, once each."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def sole_user(value: ir.Value, *op_types: str) -> ir.Node | None:
    """Return the only reader of ``value`` if there is just one and it is of ``op_types``."""
    readers = users(value)
    if len(readers) != 1 or value.is_graph_output():
        return None
    return readers[0] if not op_types or is_op(readers[0], *op_types) else None


def constant(value: ir.Value | None, limit: int = 1 << 16) -> npt.NDArray[Any] | None:
    """Return what ``value`` always holds, if it is known and has at most ``limit`` elements."""
    if value is None or value.is_graph_input():  # an overridable initializer is not constant
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return tensor.numpy() if tensor is not None and tensor.size <= limit else None


def scalar(value: ir.Value | None) -> float | None:
    """Return the number that ``value`` always holds, if it is just one."""
    array = constant(value, 1)
    return float(array.reshape(()).item()) if array is not None and array.size == 1 else None


def ints(value: ir.Value | None) -> list[int] | None:
    """Return the integers that ``value`` always holds, flattened."""
    array = constant(value, 4096)
    return [int(i) for i in array.reshape(-1)] if array is not None else None


def weight(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer, unread."""
    if value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value


def shape(value: ir.Value | None) -> list[Dim] | None:
    """Return the sizes of ``value``: ints and symbols; None where its rank is unknown.

    An unknown size becomes a symbol that equals no other.
    """
    if value is None or value.shape is None:
        return None
    return [
        dim if isinstance(dim, int) else (str(dim.value) if dim.value else f"?{id(value)}.{i}")
        for i, dim in enumerate(value.shape)
    ]


def rank(value: ir.Value | None) -> int | None:
    """Return how many axes ``value`` has, if known."""
    return None if value is None or value.shape is None else len(value.shape)


def static(value: ir.Value | None, axis: int) -> int | None:
    """Return the size of one axis where it is a known number."""
    sizes = shape(value)
    if sizes is None or not -len(sizes) <= axis < len(sizes):
        return None
    size = sizes[axis]
    return size if isinstance(size, int) else None


def broadcast(*values: ir.Value) -> ir.Shape | None:
    """Return the shape that ``values`` broadcast to, where all their ranks are known."""
    sizes = [shape(value) for value in values]
    if any(size is None for size in sizes):
        return None
    known: list[list[Dim]] = [size for size in sizes if size is not None]
    depth = max(len(size) for size in known)
    ones: list[Dim] = [1] * depth
    columns = zip(*(ones[len(size) :] + size for size in known), strict=True)
    return ir.Shape([next((d for d in column if d != 1), 1) for column in columns])


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """Return an attribute's plain value, or ``default`` where it is not set."""
    attr = node.attributes.get(name)
    return default if attr is None else attr.value


def ancestors(values: Sequence[ir.Value], stop: Sequence[ir.Value] = ()) -> list[ir.Node]:
    """Return the nodes that ``values`` are computed by, in topological order."""
    seen: set[ir.Value] = set(stop)
    order: dict[ir.Node, None] = {}
    stack: list[tuple[ir.Value, bool]] = [(value, False) for value in values]
    while stack:
        value, done = stack.pop()
        node = value.producer()
        if done:
            if node is not None:
                order[node] = None
            continue
        if value in seen:
            continue
        seen.add(value)
        if node is not None:
            stack.append((value, True))
            stack.extend((v, False) for v in _reads(node) if v not in seen)
    return list(order)


def roots(values: Sequence[ir.Value]) -> list[ir.Value]:
    """Return the graph inputs and initializers that ``values`` depend on."""
    found: dict[ir.Value, None] = {}
    for value in values:
        if value.producer() is None:
            found[value] = None
    for node in ancestors(values):
        for value in _reads(node):
            if value.producer() is None:
                found[value] = None
    return list(found)


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    for attr in node.attributes.values():
        if attr.type is ir.AttributeType.GRAPH:
            for inner in attr.as_graph().all_nodes():
                yield from (v for v in inner.inputs if v is not None and v.graph is node.graph)


class Builder:
    """Adds nodes in front of ``anchor``, with names made from its name.

    Args:
        anchor: The node that the new ones go before, or a graph, to append to.
    """

    def __init__(self, anchor: ir.Node | ir.Graph) -> None:
        graph = anchor if isinstance(anchor, ir.Graph) else anchor.graph
        assert isinstance(graph, ir.Graph)
        self.graph = graph
        self.anchor = anchor

    def op(  # noqa: PLR0913 - an operator has this many parts
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        domain: str = "",
        name: str | None = None,
        like: ir.Value | None = None,
        shape: ir.Shape | Sequence[Dim | None] | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """Add a node of one output and return that output.

        Args:
            op_type: Operator.
            inputs: Operands, None for one that is absent.
            attributes: Plain values by name.
            domain: Domain of the operator.
            name: Name of the node and its output; made of the anchor's where there is none.
            like: Value whose type the output has, and whose shape unless ``shape`` is another.
            shape: Sizes of the output.
            dtype: Data type of the output, if it is not that of ``like``.
        """
        (out,) = self.ops(op_type, inputs, attributes, domain=domain, name=name)
        if like is not None:
            out.shape, out.type = like.shape, like.type
        if shape is not None:
            out.shape = shape if isinstance(shape, ir.Shape) else ir.Shape(shape)
        if dtype is not None:
            out.type = ir.TensorType(dtype)
        return out

    def ops(  # noqa: PLR0913 - an operator has this many parts
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        outputs: int = 1,
        domain: str = "",
        name: str | None = None,
    ) -> Sequence[ir.Value]:
        """Add a node and return its outputs."""
        if name is None:
            scope = "" if isinstance(self.anchor, ir.Graph) else scope_of(self.anchor)
            name = f"{scope}/{op_type}" if scope else op_type
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for value in node.outputs:
            value.name = unused(self.graph, name)
        if isinstance(self.anchor, ir.Graph):
            self.graph.append(node)
        else:
            self.graph.insert_before(self.anchor, node)
        return node.outputs

    def constant(self, array: npt.ArrayLike, dtype: Any = None) -> ir.Value:
        """Return an initializer that holds ``array``; equal small ones are shared."""
        data = np.asarray(array, dtype)
        text = "_".join(str(x) for x in data.reshape(-1)[:4])
        name = f"const_{data.dtype}_{'x'.join(map(str, data.shape))}_{text}"
        known = self.graph.initializers.get(name)
        held = known.const_value if known is not None else None
        if known is not None and held is not None and np.array_equal(held.numpy(), data):
            return known
        return self.initializer(name, ir.tensor(data))

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Return a new initializer of this name."""
        return add_initializer(self.graph, name, tensor)


def scope_of(node: ir.Node) -> str:
    """Return the module that a node came from: ``layers.0.attention`` of its name's path."""
    return (node.name or "").rpartition("/")[0]


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register ``tensor`` under ``name`` (made unique) and return its value."""
    value = ir.Value(
        name=unused(graph, name),
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def unused(graph: ir.Graph, name: str) -> str:
    """Return ``name``, or the first of ``name_2``, ``name_3``... that no value has; take it."""
    names = taken(graph)
    candidate, number = name, 2
    while candidate in names:
        candidate, number = f"{name}_{number}", number + 1
    names.add(candidate)
    return candidate


def name_nodes(graph: ir.Graph) -> None:
    """Give every node a name of its own; the first of equals keeps it."""
    names: set[str] = set()
    for node in graph:
        stem = node.name or node.op_type
        candidate, number = stem, 2
        while candidate in names:
            candidate, number = f"{stem}_{number}", number + 1
        names.add(candidate)
        node.name = candidate


def taken(graph: ir.Graph) -> set[str]:
    """Return the names of all values of ``graph``, kept with it so that asking is cheap."""
    names: set[str] | None = graph.meta.get(_NAMES)
    if names is None:
        made = (value for node in graph for value in node.outputs)
        values = (*graph.inputs, *graph.initializers.values(), *made)
        names = {str(value.name) for value in values}
        graph.meta[_NAMES] = names
    return names


_NAMES: Final = "llmopt.names"


def clone(model: ir.Model) -> ir.Model:
    """Return a copy of ``model`` that shares its weights, and takes names for itself alone."""
    made = model.clone()
    if _NAMES in made.graph.meta:
        made.graph.meta[_NAMES] = set(made.graph.meta[_NAMES])
    return made


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old`` read ``new``; a graph output keeps its name and type."""
    if new.shape is None:
        new.shape = old.shape
    if new.type is None:
        new.type = old.type
    if not old.is_graph_output():
        old.replace_all_uses_with(new)
        return
    graph = old.graph
    assert graph is not None
    name = old.name
    if new.is_graph_output() or new.is_graph_input() or new.is_initializer():
        node = ir.node("Identity", [new], name=f"{name}/Identity")
        old_node = old.producer()
        assert old_node is not None
        graph.insert_before(old_node, node)
        new, node.outputs[0].shape, node.outputs[0].type = node.outputs[0], old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name = f"{name}_replaced"
    new.name = name


def replace_output(old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` be the graph output that ``old`` is; what else reads ``old`` still does."""
    if new.shape is None:
        new.shape = old.shape
    if new.type is None:
        new.type = old.type
    graph, name = old.graph, old.name
    if not old.is_graph_output():
        old.replace_all_uses_with(new)
        return
    assert graph is not None
    for index, output in enumerate(list(graph.outputs)):
        if output is old:
            graph.outputs[index] = new
    old.name = f"{name}_replaced"
    new.name = name


def remove_dead(model: ir.Model) -> bool:
    """Remove nodes and initializers whose results nothing reads; say whether any was."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    return bool(RemoveUnusedNodesPass()(model).modified)
