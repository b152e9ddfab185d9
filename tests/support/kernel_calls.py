"""Kernels of TVM, compiled and called on arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.backends.tvm.features import Features, find_processor
from llmopt.backends.tvm.kernels.kernel import Kernel

Array = npt.NDArray[Any]
AVX2 = "haswell"


def host() -> Features:
    """Return what this machine can do."""
    return find_processor("x86_64", "host").features


def narrow() -> Features:
    """Return AVX2 alone."""
    return Features(avx2=True)


def compiled(kernel: Kernel, mcpu: str = "host") -> Any:
    """Return the function of a kernel, for this machine or a named processor."""
    import tvm

    processor = find_processor("x86_64", mcpu)
    module = tvm.IRModule({"main": kernel.function.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=tvm.target.Target(processor.target))["main"]


def call(
    kernel: Kernel, given: Mapping[str, Array], outputs: Mapping[str, Array], mcpu: str = "host"
) -> dict[str, Array]:
    """Return a kernel's outputs, and its inputs as it left them.

    Args:
        kernel: The kernel.
        given: Its inputs by name.
        outputs: What its outputs hold before: shapes and dtypes.
        mcpu: LLVM's name of a processor; "host" for this machine.
    """
    import tvm

    held = {**given, **outputs}
    tensors = {name: tvm.runtime.tensor(held[name]) for name in (*kernel.inputs, *kernel.outputs)}
    compiled(kernel, mcpu)(*tensors.values())
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def floats(rng: np.random.Generator, *shape: int) -> Array:
    """Return normal float32 numbers."""
    return rng.standard_normal(shape, dtype=np.float32)


def error(got: Array, want: Array) -> float:
    """Return the largest difference over the largest magnitude wanted."""
    return float(np.abs(got - want).max() / np.abs(want).max())
