"""A graph assembled from parts that are traced once each.

A decoder of thirty equal layers is traced as three small modules: the embedding, one layer and the
head. The layer's graph is then repeated with each layer's weights. Verification runs the artifact
against all layers of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from llmopt.frontend.tensors import Read
from llmopt.ir.dialect import IR_VERSION, OPSET
from llmopt.ir.graph import name_nodes, taken, unused
from llmopt.ir.weights import Leaf


class Assembly:
    """A graph that grows part by part.

    Args:
        read: Function from a parameter's name to its values.
    """

    def __init__(self, read: Read) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="model")
        self._read = read
        self._constants: dict[ir.Value, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Add a graph input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        taken(self.graph).add(name)
        return value

    def output(self, value: ir.Value, name: str) -> None:
        """Make ``value`` a graph output of this name."""
        value.name = unused(self.graph, name)
        self.graph.outputs.append(value)

    def add(
        self,
        part: ir.Graph,
        inputs: Sequence[ir.Value],
        rename: Callable[[str], str] = str,
        prefix: str = "",
    ) -> list[ir.Value]:
        """Append a copy of ``part`` and return the values of its outputs.

        Args:
            part: The graph to copy.
            inputs: Values to bind the part's inputs to, in order.
            rename: Function from the part's parameter and scope names to the model's.
            prefix: Prefix of the names of the copy's values.
        """
        values: dict[ir.Value, ir.Value] = dict(zip(part.inputs, inputs, strict=True))
        initializers = part.initializers.values()
        values |= {value: self._initializer(value, rename) for value in initializers}
        for node in part:
            copy = self._node(node, values, rename, prefix)
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                values[old] = new
        return [values[value] for value in part.outputs]

    def model(self) -> ir.Model:
        """Return the assembled model."""
        name_nodes(self.graph)
        return ir.Model(self.graph, ir_version=IR_VERSION, producer_name="llmopt")

    def _node(
        self,
        node: ir.Node,
        values: Mapping[ir.Value, ir.Value],
        rename: Callable[[str], str],
        prefix: str,
    ) -> ir.Node:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if v is None else values[v] for v in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=rename(node.name or ""),
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name = unused(self.graph, f"{prefix}{old.name}")
            new.shape, new.type = old.shape, old.type
        self.graph.append(copy)
        return copy

    def _initializer(self, value: ir.Value, rename: Callable[[str], str]) -> ir.Value:
        tensor = value.const_value
        assert tensor is not None
        if not isinstance(tensor, Leaf):
            if value not in self._constants:
                self._constants[value] = self._register(str(value.name), tensor)
            return self._constants[value]
        name = rename(tensor.source)
        known = self.graph.initializers.get(name)
        if known is not None:
            return known
        read, dtype = self._read, tensor.dtype
        leaf = Leaf(
            name,
            lambda: read(name).astype(dtype.numpy(), copy=False),
            dtype,
            [int(n) for n in tensor.shape.numpy()],
        )
        return self._register(name, leaf)

    def _register(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=unused(self.graph, name),
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value
