"""Kernels of TVM for rows: norms, lookups, rotation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from support.kernel_calls import AVX2, Array, call, error, floats, host, narrow

from llmopt.backends.tvm.kernels.gather import gather
from llmopt.backends.tvm.kernels.heads import Rotation
from llmopt.backends.tvm.kernels.norms import Norm, norm
from llmopt.backends.tvm.kernels.rotary import rotary

CLOSE = 1e-6
"""Of the largest magnitude: a few roundings of float32."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def normed(wanted: Norm, given: dict[str, Array]) -> Array:
    parts = given["x"].astype(np.float64)
    if wanted.kind == "layer":
        parts = parts - parts.mean(-1, keepdims=True)
    parts = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + wanted.eps) * given["weight"]
    out: Array = parts + (given["bias"] if wanted.bias else 0.0)
    return out


NORMS = [
    Norm("rms", 576, 1e-5),
    Norm("rms", 96, 1e-2, rows="one"),
    Norm("layer", 72, 1e-12, bias=True),
    Norm("layer", 7, 1e-5),
]


@pytest.mark.parametrize("wanted", NORMS, ids=lambda wanted: wanted.label)
def test_a_norm_is_what_its_formula_says(wanted: Norm, rng: np.random.Generator) -> None:
    kernel = norm(wanted, host())
    shape = (5, wanted.width)
    given = {name: floats(rng, wanted.width) for name in ("weight", "bias")}
    given["x"] = 3 + floats(rng, *shape)
    out = call(kernel, given, {"y": np.zeros(shape, np.float32)})
    assert error(out["y"], normed(wanted, given)) < CLOSE


def test_a_norm_of_large_numbers_with_avx2_alone(rng: np.random.Generator) -> None:
    wanted = Norm("layer", 40, 1e-5, bias=True)
    given = {"x": 1000 + floats(rng, 2, 40), "weight": floats(rng, 40), "bias": floats(rng, 40)}
    out = call(norm(wanted, narrow()), given, {"y": np.zeros((2, 40), np.float32)}, AVX2)
    assert error(out["y"], normed(wanted, given)) < 2e-4  # 1000 has 4 digits less


def test_a_lookup_takes_ids_from_both_ends(rng: np.random.Generator) -> None:
    table, ids = floats(rng, 11, 24), np.array([0, 10, -1, -11, 5])
    out = call(gather(24, host()), {"table": table, "ids": ids}, {"y": floats(rng, 5, 24)})
    np.testing.assert_array_equal(out["y"], table[ids])


@pytest.mark.parametrize("wrong", [11, -12])
def test_a_lookup_outside_the_table_is_an_error(wrong: int, rng: np.random.Generator) -> None:
    given = {"table": floats(rng, 11, 24), "ids": np.array([3, wrong])}
    with pytest.raises(RuntimeError, match="outside the table"):
        call(gather(24, host(), "one"), given, {"y": floats(rng, 2, 24)})


@pytest.mark.parametrize(("width", "turned"), [(64, 64), (24, 8), (16, 6)])
def test_rotation_turns_halves(width: int, turned: int, rng: np.random.Generator) -> None:
    heads, half = 3, turned // 2
    x = floats(rng, 6, heads * width)
    given: dict[str, Any] = {name: floats(rng, 11, half) for name in ("cos", "sin")}
    given["position_ids"] = rng.integers(0, 11, (2, 3))
    kernel = rotary(Rotation(width, turned), heads, host())
    out = call(kernel, {"x": x, **given}, {"y": np.zeros_like(x)})["y"]
    wanted = x.astype(np.float64).reshape(6, -1, width)
    cos, sin = (given[name][given["position_ids"].reshape(-1)][:, None] for name in ("cos", "sin"))
    low, high = wanted[..., :half].copy(), wanted[..., half:turned].copy()
    wanted[..., :half] = low * cos - high * sin
    wanted[..., half:turned] = high * cos + low * sin
    assert error(out, wanted.reshape(6, -1)) < CLOSE
