"""How a kernel's function is made: its parameters as data, its code by a Python function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx import Var
from tvm.tirx.script import builder as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.kernels.kernel import Kernel

Body = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Argument:
    """One parameter of a kernel.

    Args:
        name: Name in `Kernel.inputs` or `Kernel.outputs`.
        shape: Sizes; a text such as ``"m"`` stands for a number known when the kernel runs, the
            same wherever it is written.
        dtype: Element type.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"


def kernel(
    name: str, inputs: Sequence[Argument], outputs: Sequence[Argument], body: Body
) -> Kernel:
    """Return the kernel whose code ``body`` emits, given its buffers by name."""
    names = (tuple(argument.name for argument in each) for each in (inputs, outputs))
    return Kernel(name, function(name, [*inputs, *outputs], body), *names)


def function(name: str, arguments: Sequence[Argument], body: Body) -> Any:
    """Return the function ``name`` whose code ``body`` emits, given its buffers by name."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True})
        sizes: dict[str, Any] = {}
        buffers = {}
        for argument in arguments:
            shape = [_size(size, sizes) for size in argument.shape]
            buffer = T.Buffer(shape, argument.dtype)
            buffers[argument.name] = T.arg(argument.name, buffer)
        body(buffers)
    return builder.get()


def _size(size: int | str, sizes: dict[str, Any]) -> Any:
    if isinstance(size, int):
        return T.int64(size)
    if size not in sizes:
        sizes[size] = Var(size, "int64")
    return sizes[size]
