"""One function of a module while it is written: its parameters, values, weights and calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx_ir as ir

from llmopt.backends.tvm import api, sizes
from llmopt.backends.tvm.entries import EntryPoint
from llmopt.backends.tvm.kernels.kernel import Kernel
from llmopt.backends.tvm.rules import rule_of
from llmopt.backends.tvm.sizes import Known, known
from llmopt.backends.tvm.weights import StoredArray
from llmopt.backends.tvm.writing import shape_of
from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir import weights

if TYPE_CHECKING:
    from llmopt.backends.tvm.module import Module

_INLINE: Final = 16
"""A constant of at most this many numbers is part of the code."""


class Function:
    """One function while it is being written.

    Args:
        module: Module that it is part of.
        entry: Entry point of the function.
    """

    def __init__(self, module: Module, entry: EntryPoint) -> None:
        self.module = module
        self.entry = entry
        self.program = module.program
        self.features = module.features
        self.symbols: dict[str, Any] = {"B": 1, "S": 1} if entry.one else {}
        self._values: dict[ir.Value, Any] = {}
        self._known: dict[ir.Value, Known] = {}
        self._rows: dict[Any, Any] = {}
        self._fetched: dict[int, Any] = {}
        self.mask: Any = None
        self._list: Any = None
        self._scope = ""

    def write(self) -> None:
        """Write the function into the module."""
        builder = self.module.builder
        parameters = self._parameters()
        attributes = self._attributes()
        with builder.function(self.entry.name, parameters, attributes):
            with builder.dataflow():
                for node in self.program.graph:
                    self._convert(node)
                outputs = [self.tensor(value) for value in self._outputs()]
                result = builder.emit_output(outputs[0] if self._single else outputs)
            builder.emit_func_output(result)

    @property
    def _single(self) -> bool:
        return self.program.signature.has_cache

    def _outputs(self) -> list[ir.Value]:
        values = list(self.program.graph.outputs)
        return values[:1] if self._single else values

    def _attributes(self) -> dict[str, Any]:
        bounds = {"B": self.module.limits.batch, "S": self.module.limits.tokens}
        known_bounds = {
            name: bound
            for name, bound in bounds.items()
            if bound and not isinstance(self.symbols.get(name, 1), int)
        }
        return {"tir_var_upper_bound": known_bounds} if known_bounds else {}

    def _parameters(self) -> list[Any]:
        relax = api.relax()
        parameters = []
        for port in self.program.signature.inputs:
            if port.role == Role.LOGITS_TO_KEEP:
                continue
            value = next(v for v in self.program.graph.inputs if v.name == port.name)
            cached = port.role in (Role.PAST_KEY, Role.PAST_VALUE)
            shape = ["C" if dim == "P" and cached else dim for dim in port.shape]
            kind = api.tensor_type([self._size(dim) for dim in shape], port.dtype)
            variable = relax.Var(_identifier(port.name), kind)
            parameters.append(variable)
            self._values[value] = variable
            if port.role == Role.MASK:
                self.mask = variable
        if self.program.signature.has_cache and self.mask is None:
            kind = api.tensor_type([self._size("B"), self._size("T")], "int64")
            self.mask = relax.Var("attention_mask", kind)
            parameters.append(self.mask)
        self._list = relax.Var("weights", relax.AnyType())
        return [*parameters, self._list]

    def _size(self, dim: int | str) -> Any:
        if isinstance(dim, int):
            return dim
        if dim not in self.symbols:
            self.symbols[dim] = api.symbol(_identifier(dim))
        return self.symbols[dim]

    @property
    def total(self) -> Any:
        """How many keys there are, past and new: T."""
        return self._size("T")

    def ones(self, batch: Any, keys: Any) -> Any:
        """Return a mask [B, T] that hides nothing."""
        return self.emit(api.relax().op.full([batch, keys], api.scalar(1, "int64"), "int64"))

    def _convert(self, node: ir.Node) -> None:
        operands = [self.known(value) for value in node.inputs if value is not None]
        found = sizes.evaluate(node, operands)
        if found is not None:
            self._known[node.outputs[0]] = found
            return
        self._scope = g.scope_of(node)
        results = rule_of(node)(self, node)
        for output, result in zip(node.outputs, results, strict=False):
            if isinstance(result, np.ndarray):
                self._known[output] = result
            elif result is not None:
                self._values[output] = self.emit(result)

    def emit(self, expression: Any) -> Any:
        """Bind an expression to a variable and return it."""
        if isinstance(expression, api.relax().Var):
            return expression
        return self.module.builder.emit(expression)

    def known(self, value: ir.Value | None) -> Known | None:
        """Return a value where it is known while compiling."""
        if value is None:
            return None
        if value not in self._known:
            found = self._keep(value) if value.is_graph_input() else sizes.constant(value)
            if found is None:
                return None
            self._known[value] = found
        return self._known[value]

    def _keep(self, value: ir.Value) -> Known | None:
        if value is not self.program.input(Role.LOGITS_TO_KEEP):
            return None
        return known(0 if self.entry.every else 1)

    def tensor(self, value: ir.Value | None) -> Any:
        """Return a value as an expression of Relax."""
        assert value is not None
        if value not in self._values:
            self._values[value] = self._made(value)
        return self._values[value]

    def _made(self, value: ir.Value) -> Any:
        tensor = g.weight(value)
        if tensor is not None:
            if tensor.size <= _INLINE:
                return api.array(np.asarray(tensor.numpy()))
            return self.weight(tensor)
        numbers = self._known[value]
        flat = list(numbers.reshape(-1))
        if all(isinstance(number, int) for number in flat):
            return api.array(np.asarray(numbers.tolist(), np.int64).reshape(numbers.shape))
        relax = api.relax()
        listed = self.emit(relax.op.shape_to_tensor(relax.ShapeExpr(flat)))
        return listed if numbers.ndim else self.emit(relax.op.reshape(listed, []))

    def weight(self, tensor: ir.TensorProtocol) -> Any:
        """Return a weight as it is, stored once for all that read the same numbers."""
        leaf = next(weights.leaves(tensor), None)
        name = leaf.source if leaf is not None else (tensor.name or "constant")
        shape = tuple(int(size) for size in tensor.shape.numpy())
        stored = StoredArray(name, tensor.dtype.numpy().name, shape)
        key = ("plain", weights.identity(tensor))
        parts = self.packed(key, {"": stored}, lambda: {"": np.asarray(tensor.numpy())})
        return parts[""]

    def packed(
        self, key: Any, parts: Mapping[str, StoredArray], read: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return the parts of a weight by name, each fetched from the list once."""
        numbers = self.module.weights.add(key, parts, read)
        return {part: self._fetch(number) for part, number in numbers.items()}

    def _fetch(self, number: int) -> Any:
        if number not in self._fetched:
            stored = self.module.weights.stored[number]
            kind = api.tensor_type(stored.shape, stored.dtype)
            self._fetched[number] = self.emit(api.listed(self._list, number, kind))
        return self._fetched[number]

    def rows(self, x: Any) -> Any:
        """Return ``x`` [.., K] as rows [M, K]."""
        shape = shape_of(x)
        if len(shape) == 2:
            return x
        if x not in self._rows:
            flat = [api.product(shape[:-1]), shape[-1]]
            self._rows[x] = self.emit(api.relax().op.reshape(x, flat))
        return self._rows[x]

    def flat(self, x: Any) -> Any:
        """Return ``x`` of any shape as a list [M]."""
        size = api.product(shape_of(x))
        return self.emit(api.relax().op.reshape(x, [size]))

    def unrows(self, x: Any, before: Sequence[Any]) -> Any:
        """Return rows [M, N] as [*before, N]."""
        if len(before) == 1:
            return x
        result = self.emit(api.relax().op.reshape(x, [*before, shape_of(x)[-1]]))
        self._rows[result] = x
        return result

    def call(
        self,
        kernel: Kernel,
        operands: Mapping[str, Any],
        outputs: Sequence[tuple[Sequence[Any], str]],
        inplace: Mapping[int, str] | None = None,
    ) -> list[Any]:
        """Call a kernel and return its outputs.

        Args:
            kernel: Kernel to call.
            operands: Operands by the kernel's own names.
            outputs: Shape and type of what it writes.
            inplace: Outputs that are operands written in place: number to name.
        """
        name = self.module.kernel(kernel)
        calls = self.module.calls.setdefault(self.entry.name, {})
        calls.setdefault(kernel.name, []).append(self._scope)
        arguments = [operands[label] for label in kernel.inputs]
        kinds = [api.tensor_type(shape, dtype) for shape, dtype in outputs]
        made = api.call(name, arguments, kinds, self._aliases(kernel, len(kinds), inplace))
        result = self.emit(made)
        if len(kinds) == 1:
            return [result]
        return [self.emit(api.relax().TupleGetItem(result, i)) for i in range(len(kinds))]

    @staticmethod
    def _aliases(kernel: Kernel, count: int, inplace: Mapping[int, str] | None) -> list[int] | None:
        if not inplace:
            return None
        return [kernel.inputs.index(inplace[i]) if i in inplace else -1 for i in range(count)]


def _identifier(name: str) -> str:
    text = "".join(c if c.isalnum() else "_" for c in name)
    return text if text[:1].isalpha() else f"d_{text}"
