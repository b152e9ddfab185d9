"""A Program becomes a module of Relax for a GPU: no kernels of ours, a cache that is copied.

The functions are those of `entries`, with the past [B, G, P, D] as an operand and the present
[B, G, P + S, D] among the results: TVM's operators write nothing in place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from llmopt.backends.tvm import api, sizes
from llmopt.backends.tvm.cuda_rules import RULES
from llmopt.backends.tvm.entries import Capacity, EntryPoint
from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.function import Function
from llmopt.backends.tvm.module import Module
from llmopt.ir import graph as g
from llmopt.ir.program import Program


class CudaModule(Module):
    """The functions of a Program in Relax's own operators, and the weights that they take.

    Args:
        program: Program to convert.
        limits: Sizes that memory is planned for.
    """

    def __init__(self, program: Program, limits: Capacity) -> None:
        super().__init__(program, Features(), limits)

    @override
    def convert(self) -> Any:
        """Return the module of Relax, weights that are read by rows multiplied so."""
        for entry in self.entries:
            CudaFunction(self, entry).write()
        return api.relax().transform.FuseTransposeMatmul()(self.builder.get())


class CudaFunction(Function):
    """One function while it is being written.

    Args:
        module: Module that it is part of.
        entry: Entry point of the function.
    """

    def __init__(self, module: CudaModule, entry: EntryPoint) -> None:
        super().__init__(module, entry)
        if self.program.signature.has_cache:
            past = api.symbol("P")
            self.symbols = {"P": past, "C": past, **({"S": 1} if entry.one else {})}

    @property
    @override
    def _single(self) -> bool:
        return False

    @override
    def _convert(self, node: ir.Node) -> None:
        operands = [self.known(value) for value in node.inputs if value is not None]
        found = sizes.evaluate(node, operands)
        if found is not None:
            self._known[node.outputs[0]] = found
            return
        results = RULES[node.op_type](self, node)
        for output, result in zip(node.outputs, results, strict=False):
            if isinstance(result, np.ndarray):
                self._known[output] = result
            else:
                self._values[output] = self.emit(result)

    @override
    def _made(self, value: ir.Value) -> Any:
        """Return a weight, or sizes as numbers where the kernels run.

        Relax makes a tensor of a shape on the host alone; a range of one is made on the device.
        """
        numbers = self._known.get(value)
        if numbers is None or g.weight(value) is not None:
            return super()._made(value)
        op = api.relax().op
        flat = [api.plain(number) for number in numbers.reshape(-1)]
        if all(isinstance(number, int) for number in flat):
            return super()._made(value)
        ones = [self.emit(op.arange(number, number + 1, 1, "int64")) for number in flat]
        listed = ones[0] if len(ones) == 1 else self.emit(op.concat(ones, 0))
        return listed if numbers.ndim else self.emit(op.reshape(listed, []))
