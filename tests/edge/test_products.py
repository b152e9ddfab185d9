"""Products with integer weights by `sdot` and `smmla`, run by an arm64 processor's emulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from edge.arm64 import Arm64

from llmopt.backends.tvm.build import link
from llmopt.backends.tvm.features import Processor, find_processor
from llmopt.backends.tvm.kernels.linear.selection import Linear, choose, pack
from llmopt.quantization.dynamic import Columns
from llmopt.quantization.numerics import Quantized, dequantize
from llmopt.quantization.schemes import Blockwise, DynamicInt8

tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")
pytestmark = pytest.mark.slow

SCHEMES: Final = (
    Blockwise(4, 32),
    Blockwise(4, 64, symmetric=False),
    Blockwise(6, 16),
    Blockwise(8, 32),
    Blockwise(8, 16, symmetric=False),
    DynamicInt8(),
)
N, K, M = 70, 200, 13


def test_products_of_whole_numbers_are_exact_on_arm64(emulated: Arm64, tmp_path: Path) -> None:
    arm = find_processor("aarch64", "neoverse-v1")
    rng = np.random.default_rng(0)
    functions, expected = {}, {}
    for scheme in SCHEMES:
        weight, numbers = whole_weight(rng, scheme)
        for rows in ("one", "many"):
            wanted = Linear(N, K, scheme, rows, (), arm.features, limit=127)
            found = choose(wanted)
            (kernel,) = found.kernels
            x = rng.integers(-127, 128, (1 if rows == "one" else M, K)).astype(np.float32)
            x[:, :: getattr(scheme, "block", K)] = 127  # so that rounding leaves them
            named = {"x": x, **pack(weight, found.packing)}
            save(tmp_path / f"{kernel.name}.npz", [named[name] for name in kernel.inputs])
            functions[kernel.name] = kernel.function
            expected[kernel.name] = x.astype(np.int64) @ numbers.T
    library = linked(functions, arm, tmp_path / "products.so")

    assert emulated.run(Path(__file__).with_name("kernels.py"), library, tmp_path) == "aarch64"

    for name, product in expected.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), product, name)


def whole_weight(rng: np.random.Generator, scheme: Blockwise | DynamicInt8) -> tuple[Any, Any]:
    """Return a weight of whole numbers [N, K], all codes and zero points, and its numbers."""
    if isinstance(scheme, DynamicInt8):
        codes = rng.integers(-127, 128, (K, N)).astype(np.int8)
        return Columns(codes, np.ones(N, np.float32)), codes.T.astype(np.int64)
    shape = (N, scheme.blocks(K))
    points = None
    if not scheme.symmetric:
        points = rng.integers(0, scheme.levels, shape, dtype=np.uint8)
    unsigned = rng.integers(0, scheme.levels, (N, scheme.padded(K)), dtype=np.uint8)
    weight = Quantized(unsigned, np.ones(shape, np.float32), points, scheme, K)
    return weight, dequantize(weight).astype(np.int64)


def save(place: Path, inputs: list[Any]) -> None:
    """Write a kernel's arguments: its inputs and room for the output."""
    arguments = [*inputs, np.full((len(inputs[0]), N), np.nan, np.float32)]
    np.savez(place, **{f"a{i:02}": array for i, array in enumerate(arguments)})


def linked(functions: dict[str, Any], processor: Processor, library: Path) -> Path:
    """Return the shared library of some kernels."""
    target = tvm.target.Target(processor.target)
    compiled = tvm.compile(tvm.IRModule(functions), target=target)
    assert "smmla" in compiled.mod.inspect_source("asm")
    compiled.export_library(str(library), fcompile=link)
    return library
