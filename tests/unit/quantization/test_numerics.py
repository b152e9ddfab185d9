"""Numerics of blockwise quantization, against plain formulas."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from llmopt.errors import UnsupportedModelError
from llmopt.quantization.numerics import (
    dequantize,
    empty,
    fake_quantize,
    quantize_blockwise,
)
from llmopt.quantization.packing import quantize_packed
from llmopt.quantization.schemes import BLOCKS, Blockwise

Matrix = NDArray[np.float32]


def random(rows: int, columns: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def usual(weight: Matrix, bits: int, block: int) -> Matrix:
    """Round with ``scale = max|x| / (2**(bits-1) - 1)``: the positive-scale convention."""
    top = 2 ** (bits - 1) - 1
    blocks = weight.reshape(-1, block)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / top
    values: Matrix = (np.clip(np.rint(blocks / scale), -top, top) * scale).reshape(weight.shape)
    return values


SAMPLES: dict[str, Callable[[np.random.Generator], NDArray[np.float64]]] = {
    "normal": lambda rng: rng.standard_normal((977, 1024)),
    "laplace": lambda rng: rng.laplace(size=(977, 1024)),
    "uniform": lambda rng: rng.uniform(-1, 1, (977, 1024)),
}


@pytest.mark.parametrize(
    ("sample", "bits", "least", "most"),
    [
        ("normal", 4, 1.39, 1.46),
        ("laplace", 4, 1.365, 1.43),
        ("uniform", 4, 1.16, 1.42),
        ("normal", 8, 1.003, 1.02),
        ("laplace", 8, 1.003, 1.02),
        ("uniform", 8, 1.001, 1.02),
    ],
)
def test_negative_scales_beat_the_usual_ones(
    sample: str, bits: int, least: float, most: float
) -> None:
    """The ratios that the docstring of `quantize_blockwise` states."""
    weight = SAMPLES[sample](np.random.default_rng(1)).astype(np.float32)
    for block in BLOCKS:
        ours = np.square(fake_quantize(weight, Blockwise(bits, block)) - weight).mean()
        theirs = np.square(usual(weight, bits, block) - weight).mean()
        assert least < theirs / ours < most


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_value_of_a_block_is_exact_where_scales_are_not_searched(sign: int) -> None:
    weight = random(4, 64)
    weight[:, [5, 37]] = sign * 9.7
    result = quantize_blockwise(weight, Blockwise(8, 32))
    assert (result.codes[:, [5, 37]] == 0).all()
    np.testing.assert_array_equal(dequantize(result)[:, [5, 37]], weight[:, [5, 37]])


def test_rounding_is_half_to_even() -> None:
    row = np.zeros((1, 16), np.float32)
    row[0, :6] = [-128.0, 0.5, 1.5, 2.5, -0.5, -1.5]
    codes = quantize_blockwise(row, Blockwise(8, 16)).codes[0, :6]
    assert (codes.astype(int) - 128).tolist() == [-128, 0, 2, 2, 0, -2]


@pytest.mark.parametrize(("sign", "zero"), [(1, 0), (-1, 15)])
def test_a_block_of_one_sign_keeps_zero_in_its_range(sign: int, zero: int) -> None:
    weight = sign * np.linspace(5, 6, 16, dtype=np.float32)[None]
    result = quantize_blockwise(weight, Blockwise(4, 16, symmetric=False))
    assert result.zero_point is not None
    assert result.zero_point.tolist() == [[zero]]
    assert result.scale[0, 0] == pytest.approx(6 / 15)
    assert np.abs(dequantize(result) - weight).max() <= 0.2001


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [1, 17, 33, 100])
def test_padding_is_zero_and_one_element_blocks_are_exact(columns: int, *, symmetric: bool) -> None:
    scheme = Blockwise(4, 16, symmetric)
    weight = random(5, columns)
    result = quantize_blockwise(weight, scheme)
    assert result.codes.shape == (5, scheme.padded(columns))
    points = 8 if result.zero_point is None else result.zero_point[:, -1:]
    assert (result.codes[:, columns:] == points).all()
    back = dequantize(result)
    assert back.shape == weight.shape
    if columns % 16 == 1:
        np.testing.assert_allclose(back[:, -1], weight[:, -1], rtol=1e-6)


@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_zeros_stay_zero_with_a_finite_scale(
    scale_dtype: type, *, symmetric: bool
) -> None:
    weight = np.zeros((2, 64), np.float32)
    weight[0, 40] = 3
    result = quantize_blockwise(weight, Blockwise(4, 32, symmetric), scale_dtype=scale_dtype)
    assert result.scale.dtype == scale_dtype
    assert result.scale[1].tolist() == [1, 1]
    back = dequantize(result)
    assert back[0, 40] == pytest.approx(3, rel=1e-3)
    assert np.count_nonzero(back) == 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("largest", [3e-8, 1e-6, 1e-4])
def test_float16_scales_below_their_normal_range_still_cover_the_block(
    largest: float, *, symmetric: bool
) -> None:
    """Rounded to nearest, a subnormal scale may be a third too small and saturate the block."""
    weight = random(8, 64) * np.float32(largest)
    result = quantize_blockwise(weight, Blockwise(4, 32, symmetric), scale_dtype=np.float16)
    steps = np.abs(result.scale.astype(np.float32)).repeat(32, axis=1)
    error = np.abs(dequantize(result) - weight) / steps
    assert error.max() <= (1.0 if symmetric else 0.5) * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_any_float_is_quantized_as_its_float32(dtype: type) -> None:
    weight: NDArray[np.floating[Any]] = random(3, 48).astype(dtype)
    narrow = quantize_blockwise(weight, Blockwise(4, 16))
    wide = quantize_blockwise(weight.astype(np.float32), Blockwise(4, 16))
    np.testing.assert_array_equal(narrow.codes, wide.codes)
    np.testing.assert_array_equal(narrow.scale, wide.scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_not_finite_is_refused_with_its_place(bad: float, *, symmetric: bool) -> None:
    weight = np.zeros((5000, 64))
    weight[4567, 3] = bad
    with pytest.raises(UnsupportedModelError, match="row 4567: column 3 is"):
        quantize_blockwise(weight, Blockwise(4, 32, symmetric))
    with pytest.raises(UnsupportedModelError, match="row 4567: column 3 is"):
        quantize_packed(weight, Blockwise(4, 32, symmetric))
    with pytest.raises(UnsupportedModelError, match="row 4567: column 3 is"):
        fake_quantize(weight, Blockwise(4, 32, symmetric))


def test_huge_values_do_not_overflow_on_the_way() -> None:
    weight = np.full((1, 16), np.finfo(np.float32).max / 2)
    weight[0, 1] *= -1
    for symmetric in (True, False):
        back = fake_quantize(weight, Blockwise(8, 16, symmetric))
        assert np.isfinite(back).all()
        np.testing.assert_allclose(back, weight, rtol=0.01)


def test_a_scale_beyond_float16_is_refused() -> None:
    weight = np.ones((3, 16), np.float32)
    weight[1, 2] = 65504 * 8 * 1.01
    with pytest.raises(UnsupportedModelError, match="row 1: its scale overflows float16"):
        quantize_blockwise(weight, Blockwise(4, 16), scale_dtype=np.float16)
    assert quantize_blockwise(weight, Blockwise(8, 16), scale_dtype=np.float16) is not None


def test_results_go_into_given_arrays() -> None:
    weight, scheme = random(9, 40), Blockwise(4, 16, symmetric=False)
    out = empty(9, 40, scheme, np.float16)
    assert quantize_blockwise(weight, scheme, out=out) is out
    fresh = quantize_blockwise(weight, scheme, scale_dtype=np.float16)
    np.testing.assert_array_equal(out.codes, fresh.codes)
    np.testing.assert_array_equal(out.scale, fresh.scale)
    values = np.empty((9, 40), np.float16)
    assert dequantize(out, out=values) is values
    np.testing.assert_array_equal(values, dequantize(fresh).astype(np.float16))
    assert fake_quantize(weight, scheme, scale_dtype=np.float16, out=weight) is weight
    np.testing.assert_array_equal(weight, dequantize(fresh))


@pytest.mark.parametrize(
    "out",
    [
        empty(9, 41, Blockwise(4, 16)),
        empty(8, 40, Blockwise(4, 16)),
        empty(9, 40, Blockwise(4, 32)),
    ],
)
def test_arrays_made_for_another_weight_are_refused(out: object) -> None:
    with pytest.raises(ValueError, match="out is for"):
        quantize_blockwise(random(9, 40), Blockwise(4, 16), out=out)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (4, 0)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    for quantize in (quantize_blockwise, quantize_packed):
        with pytest.raises(ValueError, match="a matrix"):
            quantize(np.zeros(shape, np.float32), Blockwise())


def test_no_rows_give_no_codes() -> None:
    assert dequantize(quantize_blockwise(np.zeros((0, 40)), Blockwise())).shape == (0, 40)


def test_temporaries_stay_small_whatever_the_weight() -> None:
    weight, scheme = random(4096, 2048), Blockwise(4, 32)
    out = empty(4096, 2048, scheme)
    tracemalloc.start()
    quantize_blockwise(weight, scheme, out=out)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4e6
