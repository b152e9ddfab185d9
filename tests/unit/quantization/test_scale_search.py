"""Searched scales: never worse than the usual ones, whatever the block, chunk or type."""

from typing import Any, Final

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from llmopt.quantization import scale_search
from llmopt.quantization.numerics import dequantize, fake_quantize, quantize_blockwise
from llmopt.quantization.packing import quantize_packed, unpack
from llmopt.quantization.scale_search import search_scales
from llmopt.quantization.schemes import BLOCKS, Blockwise

Matrix = NDArray[np.float32]
TYPES: Final[dict[str, Any]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def random(rows: int, columns: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def importance_of(columns: int) -> Matrix:
    return np.exp2(np.random.default_rng(9).uniform(-6, 10, columns)).astype(np.float32)


def weights_of(blocks: Matrix, importance: Matrix | None) -> NDArray[np.float64]:
    """Return what errors are multiplied by, as the module's docstring says it."""
    squares = np.square(blocks.astype(np.float64))
    guess: NDArray[np.float64] = np.sqrt(squares.mean(axis=1, keepdims=True) + squares)
    if importance is None:
        return guess
    rows = len(blocks) * blocks.shape[1] // len(importance)
    guess *= np.tile(importance, rows).reshape(blocks.shape)
    return guess


def error_of(
    blocks: Matrix, scale: NDArray[Any], scheme: Blockwise, weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    steps = scale.astype(np.float64)[:, None]
    codes = np.clip(np.rint(blocks / steps), -scheme.middle, scheme.middle - 1)
    error: NDArray[np.float64] = (weights * np.square(blocks - codes * steps)).sum(axis=1)
    return error


def usual_scales(blocks: Matrix, scheme: Blockwise) -> NDArray[Any]:
    """Return the scales of a scheme that make the extreme exact, rounded to the scheme's type."""
    low, high = blocks.min(axis=1), blocks.max(axis=1)
    if scheme.positive:
        scale = np.maximum(high / (scheme.middle - 1), -low / scheme.middle)
    else:
        scale = np.where(high > -low, high, low) / -scheme.middle
    scale[scale == 0] = 1
    stored: NDArray[Any] = scale.astype(TYPES[scheme.scale])
    return stored


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("scale", TYPES)
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_no_block_is_worse_than_with_its_usual_scale(
    block: int, scale: str, *, positive: bool, weighed: bool
) -> None:
    scheme = Blockwise(4, block, positive=positive, scale=scale)
    weight = random(40, 512) * np.exp2(random(40, 512, 1)).astype(np.float32)
    importance = importance_of(512) if weighed else None
    blocks = weight.reshape(-1, block)
    near = usual_scales(blocks, scheme)
    spread = None if importance is None else np.tile(importance, 40).reshape(-1, block)
    found = search_scales(blocks, near, scheme, spread)
    assert found.dtype == near.dtype
    assert not positive or (found > 0).all()
    weights = weights_of(blocks, importance)
    before = error_of(blocks, near, scheme, weights)
    after = error_of(blocks, found, scheme, weights)
    assert (after <= before).all()
    assert (after < before).mean() > 0.5
    assert after.sum() < 0.97 * before.sum()


def test_three_trials_are_nearly_as_good_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure that the docstring of `TRIALS` states, and how little other signs save."""
    scheme, blocks = Blockwise(4, 32), random(20_000, 32)
    near, weights = usual_scales(blocks, scheme), weights_of(blocks, None)

    def error() -> float:
        return float(error_of(blocks, search_scales(blocks, near, scheme), scheme, weights).sum())

    few = error()
    grid = np.arange(0.7, 1.2, 0.03)
    monkeypatch.setattr(scale_search, "TRIALS", (*scale_search.TRIALS, -7 / 8, -15 / 16))
    assert 0.997 < error() / few < 1
    monkeypatch.setattr(scale_search, "TRIALS", (*grid, *-grid))
    assert 1.005 < few / error() < 1.02


@pytest.mark.parametrize("largest", [8, 7])
def test_a_block_of_codes_times_a_scale_is_exact(largest: int) -> None:
    """Also where the largest code is 7, so that the usual scale is another."""
    rng = np.random.default_rng(3)
    codes = rng.integers(-largest, 8, (300, 32))
    codes[:, 5] = -largest
    scale = rng.uniform(0.01, 3, (300, 1)).astype(np.float16)
    weight = (codes * scale.astype(np.float32)).astype(np.float32)
    back = fake_quantize(weight, Blockwise(4, 32, scale="float16"))
    np.testing.assert_array_equal(back, weight)


@pytest.mark.parametrize("importance", [None, importance_of(96)], ids=["alike", "measured"])
def test_rows_do_not_depend_on_their_neighbours(importance: Matrix | None) -> None:
    scheme, weight = Blockwise(4, 32, scale="float16"), random(3000, 96)
    whole = quantize_blockwise(weight, scheme, importance)
    again = quantize_blockwise(weight, scheme, importance)
    np.testing.assert_array_equal(whole.codes, again.codes)
    for rows in (slice(0, 1), slice(17, 19), slice(100, 2000)):
        part = quantize_blockwise(weight[rows], scheme, importance)
        np.testing.assert_array_equal(part.scale, whole.scale[rows])
        np.testing.assert_array_equal(part.codes, whole.codes[rows])
    packed = unpack(quantize_packed(weight, scheme, importance))
    np.testing.assert_array_equal(packed.codes, whole.codes)
    back = fake_quantize(weight, scheme, importance)
    np.testing.assert_array_equal(back, dequantize(whole))


def test_one_block_alone_is_searched_as_among_others() -> None:
    scheme, weight = Blockwise(4, 32), random(500, 32)
    whole = quantize_blockwise(weight, scheme).scale
    alone = [quantize_blockwise(row[None], scheme).scale[0] for row in weight]
    np.testing.assert_array_equal(np.array(alone), whole)


def test_columns_that_matter_are_rounded_less() -> None:
    weight, importance = random(500, 64), np.ones(64, np.float32)
    importance[[3, 40]] = 1000
    alike, weighed = (
        np.square(fake_quantize(weight, Blockwise(4, 32), of) - weight).mean(axis=0)
        for of in (None, importance)
    )
    assert weighed[[3, 40]].max() < 0.5 * alike[[3, 40]].min()


def test_padding_changes_nothing() -> None:
    weight, importance = random(9, 40), importance_of(40)
    padded = np.concatenate([weight, np.zeros((9, 24), np.float32)], axis=1)
    more = np.concatenate([importance, np.ones(24, np.float32)])
    scheme = Blockwise(4, 32)
    found = quantize_blockwise(weight, scheme, importance)
    np.testing.assert_array_equal(found.codes, quantize_blockwise(padded, scheme, more).codes)


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 3e38])
def test_the_smallest_and_the_largest_numbers_stay_what_they_are(size: float) -> None:
    weight = (random(20, 32).clip(-1, 1) * size).astype(np.float32)
    back = fake_quantize(weight, Blockwise(4, 32))
    assert np.isfinite(back).all()
    assert np.abs(back - weight).max() <= 0.15 * size


def test_eight_bits_and_zero_points_keep_the_usual_scale() -> None:
    assert Blockwise(6).searched
    assert not Blockwise(8).searched
    assert not Blockwise(4, symmetric=False).searched
    assert not Blockwise(4, positive=True).searched
