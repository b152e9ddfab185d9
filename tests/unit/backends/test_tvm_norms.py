"""Kernels of TVM for rows: norms, activations, softmax, argmax, lookups, rotation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest

pytest.importorskip("tvm")

from kernel_calls import AVX2, Array, call, error, floats, host, narrow

from llmopt.backends.tvm.kernels.activations import activation, gated
from llmopt.backends.tvm.kernels.gather import gather
from llmopt.backends.tvm.kernels.heads import Turning
from llmopt.backends.tvm.kernels.norms import Norm, argmax, norm, softmax
from llmopt.backends.tvm.kernels.rotary import rotary

CLOSE = 1e-6
"""Of the largest magnitude: a few roundings of float32."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def normed(wanted: Norm, given: dict[str, Array]) -> Array:
    x = given["x"].astype(np.float64) + (given["skip"] if wanted.skip else 0.0)
    parts = x.reshape(len(x), wanted.heads, wanted.width)
    if wanted.kind == "layer":
        parts = parts - parts.mean(-1, keepdims=True)
    parts = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + wanted.eps) * given["weight"]
    out: Array = (parts + (given["bias"] if wanted.bias else 0.0)).reshape(x.shape)
    return out


NORMS = [
    Norm("rms", 576, 1e-5),
    Norm("rms", 64, 1e-6, heads=3, rows="one"),
    Norm("rms", 96, 1e-2, skip=True, rows="one"),
    Norm("layer", 72, 1e-12, skip=True, bias=True),
    Norm("layer", 7, 1e-5),
]


@pytest.mark.parametrize("wanted", NORMS, ids=lambda wanted: wanted.label)
def test_a_norm_is_what_its_formula_says(wanted: Norm, rng: np.random.Generator) -> None:
    kernel = norm(wanted, host())
    shape = (5, wanted.heads * wanted.width)
    given = {name: floats(rng, wanted.width) for name in ("weight", "bias")}
    given |= {name: 3 + floats(rng, *shape) for name in ("x", "skip")}
    out = call(kernel, given, {name: np.zeros(shape, np.float32) for name in kernel.outputs})
    assert error(out["y"], normed(wanted, given)) < CLOSE
    if wanted.skip:
        np.testing.assert_array_equal(out["sum"], given["x"] + given["skip"])


def test_a_norm_of_large_numbers_with_avx2_alone(rng: np.random.Generator) -> None:
    wanted = Norm("layer", 40, 1e-5, bias=True)
    given = {"x": 1000 + floats(rng, 2, 40), "weight": floats(rng, 40), "bias": floats(rng, 40)}
    out = call(norm(wanted, narrow()), given, {"y": np.zeros((2, 40), np.float32)}, AVX2)
    assert error(out["y"], normed(wanted, given)) < 2e-4  # 1000 has 4 digits less


def gelu(x: Array) -> Array:
    out: Array = x * np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)))(x)
    return out


def gelu_tanh(x: Array) -> Array:
    out: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return out


EXACT: dict[str, tuple[Callable[[Array], Array], float]] = {
    "exp": (np.exp, 30.0),
    "tanh": (np.tanh, 9.0),
    "silu": (lambda x: x / (1 + np.exp(-x)), 40.0),
    "gelu": (gelu, 8.0),
    "gelu_tanh": (gelu_tanh, 8.0),
}


@pytest.mark.parametrize("name", EXACT)
def test_activations_are_accurate_over_their_range(name: str) -> None:
    exact, reach = EXACT[name]
    x = np.linspace(-reach, reach, 4096, dtype=np.float32).reshape(2, -1)
    out = call(activation(name, x.shape[1], host()), {"x": x}, {"y": np.zeros_like(x)})
    wanted = exact(x.astype(np.float64))
    scale = np.abs(wanted) if name == "exp" else np.maximum(np.abs(x), 1.0)
    bound = {"exp": 3e-7 + 1e-7 * np.abs(x)}.get(name, 4e-7)
    assert (np.abs(out["y"] - wanted) <= bound * scale).all()


def test_exponentials_end_at_zero_and_stay_finite() -> None:
    x = np.array([[-3e38, -1e30, -127.0, -88.0, 0.0, 88.0, 1e30, 3e38]], np.float32)
    out = call(activation("exp", 8, host(), "one"), {"x": x}, {"y": np.ones_like(x)})["y"][0]
    assert out[:3].tolist() == [0, 0, 0]
    assert out[4] == 1
    assert np.isfinite(out).all()
    assert out[-1] == pytest.approx(2.0**126)


def test_a_gate_multiplies_the_other_half(rng: np.random.Generator) -> None:
    x = floats(rng, 3, 2 * 24)
    out = call(gated("silu", 24, host()), {"x": x}, {"y": np.zeros((3, 24), np.float32)})
    gate, up = x[:, :24].astype(np.float64), x[:, 24:]
    assert error(out["y"], gate / (1 + np.exp(-gate)) * up) < CLOSE


@pytest.mark.parametrize("rows", ["one", "many"])
def test_softmax_sums_to_one_at_any_magnitude(
    rows: Literal["one", "many"], rng: np.random.Generator
) -> None:
    x = 50 * floats(rng, 3, 200)
    x[1] += 1e6
    out = call(softmax(200, host(), rows), {"x": x}, {"y": np.zeros_like(x)})["y"]
    powers = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    assert error(out, powers / powers.sum(-1, keepdims=True)) < 2e-6
    np.testing.assert_allclose(out.sum(-1), 1, rtol=1e-6)


def test_argmax_is_the_first_of_equals(rng: np.random.Generator) -> None:
    x = floats(rng, 4, 1000)
    x[1, [40, 999]], x[2, 0], x[3, 999] = 9, 9, 9
    out = call(argmax(1000, host()), {"x": x}, {"y": np.zeros(4, np.int64)})
    assert out["y"].tolist() == x.argmax(-1).tolist()


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
def test_rotation_turns_halves_and_passes_the_rest(
    width: int, turned: int, rng: np.random.Generator
) -> None:
    heads, passed, half = 3, 2, turned // 2
    x = floats(rng, 6, (heads + passed) * width)
    given: dict[str, Any] = {name: floats(rng, 11, half) for name in ("cos", "sin")}
    given["position_ids"] = rng.integers(0, 11, (2, 3))
    kernel = rotary(Turning(width, turned), heads, passed, host())
    out = call(kernel, {"x": x, **given}, {"y": np.zeros_like(x)})["y"]
    wanted = x.astype(np.float64).reshape(6, -1, width)
    cos, sin = (given[name][given["position_ids"].reshape(-1)][:, None] for name in ("cos", "sin"))
    low, high = wanted[:, :heads, :half].copy(), wanted[:, :heads, half:turned].copy()
    wanted[:, :heads, :half] = low * cos - high * sin
    wanted[:, :heads, half:turned] = high * cos + low * sin
    assert error(out, wanted.reshape(6, -1)) < CLOSE
