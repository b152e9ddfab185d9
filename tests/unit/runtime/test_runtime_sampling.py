"""Choosing tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.errors import LlmoptError, UsageError
from llmopt.interface.arrays import Array
from llmopt.runtime.sampling import Sampler, Sampling, draw, shortlist, softmax

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)


def chances(logits: Array, sampling: Sampling) -> Array:
    tokens, kept = shortlist(logits, sampling)
    full = np.zeros(logits.size)
    full[tokens] = kept
    return full


@settings(deadline=None)
@given(LOGITS, st.floats(0.1, 4), st.floats(0.01, 1), st.integers(0, 50))
def test_shortlist_is_a_distribution_that_keeps_the_order(
    values: list[float], temperature: float, top_p: float, top_k: int
) -> None:
    logits = np.array(values, np.float32)
    found = chances(logits, Sampling(temperature, top_p, top_k))
    assert found.sum() == pytest.approx(1)
    likeliest = logits >= logits.max() - 1e-6  # closer ones are equally likely
    assert found[likeliest].max() == found.max() > 0
    kept = np.isin(
        np.arange(logits.size), shortlist(logits, Sampling(temperature, top_p, top_k))[0]
    )
    full = softmax(logits.astype(np.float64) / temperature)  # where close logits come to a tie
    assert full[kept].min() >= full[~kept].max(initial=0)


@settings(deadline=None)
@given(LOGITS, st.integers(1, 50))
def test_top_k_keeps_k_and_those_as_likely_as_the_last(values: list[float], top_k: int) -> None:
    logits = np.array(values, np.float32)
    tokens, _ = shortlist(logits, Sampling(1.0, top_k=top_k))
    kth = np.sort(logits)[::-1][min(top_k, logits.size) - 1]
    assert tokens.tolist() == np.flatnonzero(logits >= kth).tolist()


@settings(deadline=None)
@given(LOGITS, st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_tokens_that_suffice(values: list[float], top_p: float) -> None:
    logits = np.array(values, np.float32)
    full = softmax(logits.astype(np.float64))
    tokens, _ = shortlist(logits, Sampling(1.0, top_p=top_p))
    assert full[tokens].sum() >= top_p - 1e-9
    assert full[tokens].sum() - full[tokens].min() < top_p + 1e-9


@pytest.mark.parametrize(
    "options",
    [(0.7, 1.0, 0), (1.3, 0.9, 0), (1.0, 1.0, 7), (0.8, 0.95, 20), (2.0, 0.3, 5)],
)
def test_distribution_is_that_of_transformers(options: tuple[float, float, int]) -> None:
    torch: Any = pytest.importorskip("torch")
    process: Any = pytest.importorskip("transformers.generation.logits_process")
    temperature, top_p, top_k = options
    logits = np.random.default_rng(5).normal(0, 3, 200).astype(np.float32)
    scores = process.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits[None]))
    if top_k:
        scores = process.TopKLogitsWarper(top_k)(None, scores)
    scores = process.TopPLogitsWarper(top_p)(None, scores)
    expected = scores.double().softmax(-1)[0].numpy()
    assert np.abs(chances(logits, Sampling(temperature, top_p, top_k)) - expected).max() < 1e-6


def test_top_p_stops_at_the_token_that_reaches_it_exactly() -> None:
    tokens, kept = shortlist(np.zeros(4), Sampling(1.0, top_p=0.5))
    assert (tokens.tolist(), kept.tolist()) == ([0, 1], [0.5, 0.5])


def test_draws_follow_the_distribution() -> None:
    random = np.random.default_rng(0)
    logits = np.log(np.array([0.1, 0.2, 0.7]))
    drawn = [draw(logits, Sampling(1.0), random) for _ in range(3000)]
    assert np.bincount(drawn) / 3000 == pytest.approx([0.1, 0.2, 0.7], abs=0.03)


def test_the_same_seed_gives_the_same_tokens_whatever_the_batch() -> None:
    logits = np.random.default_rng(1).normal(size=(3, 50))
    three = Sampler(Sampling(1.0, seed=4), 3)
    two = Sampler(Sampling(1.0, seed=4), 2)
    for _ in range(5):
        assert three.choose(logits)[:2].tolist() == two.choose(logits[:2]).tolist()


def test_rows_and_seeds_differ() -> None:
    logits = np.zeros((2, 10_000))
    first, second = Sampler(Sampling(1.0, seed=4), 2).choose(logits)
    assert first != second
    assert Sampler(Sampling(1.0, seed=5), 2).choose(logits)[0] != first
    unseeded = {int(Sampler(Sampling(1.0), 1).choose(logits[:1])[0]) for _ in range(3)}
    assert len(unseeded) > 1


def test_temperature_zero_takes_the_first_of_the_likeliest() -> None:
    logits = np.array([[1.0, 3.0, 3.0], [-np.inf, -5.0, -9.0]])
    assert Sampler(Sampling(), 2).choose(logits).tolist() == [1, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(LlmoptError, match="not finite"):
        Sampler(Sampling(), 2).choose(np.array([[0.0, 1.0], [bad, 1.0]]))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": np.nan},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"seed": -1},
    ],
)
def test_values_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Sampling(**options)
