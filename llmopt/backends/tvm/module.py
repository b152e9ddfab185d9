"""A lowered Program becomes a module of Relax, a weight file and the kernels that it calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, Final, TypeVar

from llmopt.backends.tvm import api, linear
from llmopt.backends.tvm.entries import Capacity, entries
from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.function import Function
from llmopt.backends.tvm.kernels.kernel import Kernel
from llmopt.backends.tvm.weights import WeightFile
from llmopt.ir.program import Program

Made = TypeVar("Made")
_OPAQUE: Final = 8  # TVM's OpPatternKind: nothing is fused into it


@functools.lru_cache(maxsize=1024)
def _made(make: Callable[..., Any], wanted: tuple[Hashable, ...]) -> Any:
    return make(*wanted)


class Module:
    """The functions and kernels of a Program, and the weights that they take.

    Args:
        program: Program to convert.
        features: Features that kernels may use.
        limits: Sizes that memory is planned for.

    Attributes:
        calls: For each function and kernel, the source's module of each call, in order.
    """

    def __init__(self, program: Program, features: Features, limits: Capacity) -> None:
        self.program = program
        self.features = features
        self.limits = limits
        self.entries = entries(program)
        self.products = linear.products(program)
        self.weights = WeightFile()
        self.builder = api.relax().BlockBuilder()
        self.calls: dict[str, dict[str, list[str]]] = {}
        self._kernels: dict[str, Any] = {}

    def convert(self) -> Any:
        """Return the module of Relax."""
        for entry in self.entries:
            Function(self, entry).write()
        return self.builder.get()

    @staticmethod
    def cached(make: Callable[..., Made], *key: Hashable) -> Made:
        """Return ``make(*key)``, computed once: reading a kernel's text outlasts compiling it.

        Args:
            make: Makes a kernel, the same for the same arguments.
            key: Recipe of the array.
        """
        found: Made = _made(make, key)
        return found

    def kernel(self, kernel: Kernel) -> Any:
        """Return the global name of a kernel, which is compiled once however often it is called."""
        if kernel.name not in self._kernels:
            function = kernel.function.with_attr("op_pattern", _OPAQUE)
            function = function.with_attr("global_symbol", kernel.name)
            self._kernels[kernel.name] = self.builder.add_func(function, kernel.name)
        return self._kernels[kernel.name]
