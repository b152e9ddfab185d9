"""Quality from logits, against formulas on whole arrays."""

import json
import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from llmopt.errors import AccuracyError
from llmopt.quantization.evaluation import Estimate, Quality, QualityMeter

Matrix = NDArray[np.float32]


def logits(count: int, width: int = 11, noise: float = 0.3) -> tuple[Matrix, Matrix]:
    rng = np.random.default_rng(count)
    reference = rng.standard_normal((count, width), dtype=np.float32) * 2
    spread = noise * rng.standard_normal((count, width), dtype=np.float32)
    return reference, reference + spread


def measure(reference: Matrix, candidate: Matrix, tokens: NDArray[np.int64] | None) -> Quality:
    meter = QualityMeter()
    meter.add(reference, candidate, tokens)
    return meter.result()


def probabilities(values: Matrix) -> NDArray[np.float64]:
    weights = np.exp(values.astype(np.float64))
    result: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return result


def test_every_number_is_that_of_the_plain_formula() -> None:
    reference, candidate = logits(700)
    tokens = np.random.default_rng(0).integers(0, 11, 700)
    p, q = probabilities(reference), probabilities(candidate)
    kl = (p * np.log(p / q)).sum(axis=1)
    same = (p.argmax(axis=1) == q.argmax(axis=1)).astype(float)
    surprise = -np.log(q[np.arange(700), tokens])
    root = np.sqrt(700)

    got = measure(reference, candidate, tokens)

    assert got.samples == 700
    assert got.kl_mean.value == pytest.approx(kl.mean())
    assert got.kl_mean.error == pytest.approx(kl.std(ddof=1) / root)
    assert got.kl_p99 is not None
    assert got.kl_p99.value == pytest.approx(np.quantile(kl, 0.99))
    assert got.top1.value == pytest.approx(same.mean())
    assert got.top1.error == pytest.approx(same.std(ddof=1) / root)
    assert got.perplexity is not None
    assert got.perplexity.value == pytest.approx(np.exp(surprise.mean()))
    assert got.perplexity.error == pytest.approx(
        np.exp(surprise.mean()) * surprise.std(ddof=1) / root
    )
    assert got.perplexity_reference is not None
    assert got.perplexity_reference.value == pytest.approx(
        np.exp(-np.log(p[np.arange(700), tokens]).mean())
    )


def test_chunks_of_any_size_give_the_same() -> None:
    reference, candidate = logits(700)
    tokens = np.where(np.arange(700) % 3 == 0, -1, np.arange(700) % 11)
    whole = measure(reference, candidate, tokens)
    meter = QualityMeter()
    for start, stop in ((0, 1), (1, 1), (1, 40), (40, 699), (699, 700)):
        meter.add(reference[start:stop], candidate[start:stop], tokens[start:stop])
    pieces = meter.result()
    assert pieces.samples == whole.samples
    for name in ("kl_mean", "kl_p99", "top1", "perplexity", "perplexity_reference"):
        one, other = getattr(pieces, name), getattr(whole, name)
        assert one.value == pytest.approx(other.value, rel=1e-12)
        assert one.error == pytest.approx(other.error, rel=1e-12)


def test_the_error_of_the_percentile_is_the_spread_of_many_measurements() -> None:
    """The estimate says how far p99 moves from one sample of 2000 to the next."""
    rng = np.random.default_rng(8)
    values, errors = [], []
    for _ in range(60):
        reference = rng.standard_normal((2000, 5), dtype=np.float32)
        noise = rng.standard_normal((2000, 5), dtype=np.float32)
        estimate = measure(reference, reference + 0.2 * noise, None).kl_p99
        assert estimate is not None
        assert estimate.error is not None
        values.append(estimate.value)
        errors.append(estimate.error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.35)


@pytest.mark.parametrize(("count", "known"), [(661, False), (662, True)])
def test_a_percentile_needs_enough_samples(count: int, *, known: bool) -> None:
    assert (measure(*logits(count), None).kl_p99 is not None) == known


def test_one_position_has_no_error_and_missing_is_null() -> None:
    data = json.loads(measure(*logits(1), None).to_json())
    assert data["kl_mean"]["value"] > 0
    assert data["kl_mean"]["error"] is None
    assert data["kl_p99"] is None
    assert data["perplexity"] is None
    assert data["perplexity_reference"] is None


def test_perplexity_skips_positions_with_no_next_token() -> None:
    reference, candidate = logits(4)
    some = measure(reference, candidate, np.array([3, -1, 5, -1])).perplexity
    assert some == measure(reference[::2], candidate[::2], np.array([3, 5])).perplexity


def test_a_perplexity_beyond_floats_is_null() -> None:
    surprising = np.array([[1e6, 0.0]], np.float32)
    assert measure(surprising, surprising, np.array([1])).perplexity is None


def test_huge_logits_do_not_overflow() -> None:
    big = np.array([[3e38, -3e38, 0.0], [-3e38, 3e38, 0.0]], np.float32)
    got = measure(big, big, None)
    assert got.kl_mean == Estimate(0.0, 0.0)


def test_tokens_that_both_rule_out_count_nothing() -> None:
    row = np.array([[1.0, 2.0, -np.inf]], np.float32)
    full = measure(row, row[:, [1, 0, 2]], None)
    short = measure(row[:, :2], row[:, [1, 0]], None)
    assert full.kl_mean.value == pytest.approx(short.kl_mean.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_logits_fail_instead_of_passing_a_bound(bad: float) -> None:
    reference, candidate = logits(3)
    candidate[1, 4] = bad
    with pytest.raises(AccuracyError, match="KL divergence"):
        QualityMeter().add(reference, candidate)


def test_shapes_that_do_not_go_together_are_refused() -> None:
    meter = QualityMeter()
    with pytest.raises(ValueError, match="two"):
        meter.add(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="two"):
        meter.add(np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match="one for each of 2"):
        meter.add(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="no positions"):
        meter.result()


def test_memory_is_bounded_whatever_the_chunk() -> None:
    reference = np.zeros((512, 16384), np.float32)
    meter = QualityMeter()
    tracemalloc.start()
    meter.add(reference, reference)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 64e6
    assert meter.result().kl_mean.value == 0
