"""The gate's statistics on samples whose truth is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llmopt.benchmark.gate.statistics import (
    LogRatio,
    Matrix,
    difference,
    estimate,
    holm,
    quietness,
    spent,
    student_quantile,
    student_tail,
    weighted_median,
)

TABLE = {
    (1, 0.05): 6.314,
    (7, 0.025): 2.365,
    (7, 0.005): 3.499,
    (15, 0.01): 2.602,
    (30, 0.05): 1.697,
}
"""Student's t as printed in every table: degrees of freedom and tail."""
matrices = arrays(
    np.float64, st.tuples(st.integers(2, 6), st.integers(1, 8)), elements=st.floats(-2, 2, width=32)
)


def hierarchical(rng: np.random.Generator, processes: int, blocks: int) -> Matrix:
    """Ratios around 0: processes differ, blocks differ, and one in ten is far off."""
    between = rng.normal(0, 0.01, (processes, 1))
    within = rng.normal(0, 0.05, (processes, blocks))
    spikes = rng.normal(0, 0.5, within.shape) * (rng.random(within.shape) < 0.1)
    return between + within + spikes


@pytest.mark.parametrize(("freedom", "tail"), TABLE)
def test_students_t_is_that_of_the_tables(freedom: int, tail: float) -> None:
    assert student_quantile(tail, freedom) == pytest.approx(TABLE[freedom, tail], abs=6e-4)


@given(st.floats(1e-6, 0.5), st.integers(1, 60))
def test_quantile_and_tail_are_inverse(tail: float, freedom: int) -> None:
    assert student_tail(student_quantile(tail, freedom), freedom) == pytest.approx(tail, rel=1e-5)


@given(st.floats(-30, 30), st.integers(1, 60))
def test_the_tails_of_both_sides_are_all_there_is(distance: float, freedom: int) -> None:
    both = student_tail(distance, freedom) + student_tail(-distance, freedom)
    assert both == pytest.approx(1, abs=1e-9)


@given(matrices)
def test_the_median_is_numpys_where_all_weigh_the_same(blocks: Matrix) -> None:
    assert weighted_median(blocks, np.ones_like(blocks)) == pytest.approx(np.median(blocks))


@given(
    arrays(np.float64, 5, elements=st.floats(-2, 2)),
    st.lists(st.integers(1, 4), min_size=5, max_size=5),
)
def test_a_weight_of_two_is_as_if_it_were_there_twice(values: Matrix, counts: list[int]) -> None:
    repeated = float(np.median(np.repeat(values, counts)))
    assert weighted_median(values, np.array(counts, float)) == pytest.approx(repeated)


@settings(max_examples=20)
@given(matrices, st.floats(-1, 1))
def test_what_shifts_every_block_shifts_the_estimate_alone(blocks: Matrix, shift: float) -> None:
    before, after = estimate(blocks), estimate(blocks + shift)
    assert after.value == pytest.approx(before.value + shift)
    assert after.error == pytest.approx(before.error, abs=1e-9)


def test_rows_of_other_lengths_are_as_if_the_rest_were_not_there() -> None:
    rng = np.random.default_rng(4)
    blocks = rng.normal(0, 1, (8, 6))
    padded = np.hstack([blocks, np.full((8, 5), np.nan)])
    short, long = estimate(blocks), estimate(padded)
    assert long.value == short.value == np.median(blocks)
    assert long.error == pytest.approx(short.error, rel=0.15)  # other draws of the same


@settings(max_examples=20)
@given(matrices)
def test_exchanging_the_sides_turns_the_sign(blocks: Matrix) -> None:
    other = np.flip(blocks, axis=1) * 0.5
    weights = quietness(blocks, other)
    one = estimate(blocks - other, weights)
    assert estimate(other - blocks, weights).value == pytest.approx(-one.value, abs=1e-12)
    np.testing.assert_array_equal(weights, quietness(other, blocks))


def test_one_process_says_nothing_of_others() -> None:
    alone = estimate(np.zeros((1, 50)))
    assert alone.interval() == (-math.inf, math.inf)
    assert alone.above(-1) == alone.below(1) == 0.5
    assert difference(np.zeros((1, 5)), np.zeros((9, 5))).error == math.inf


def test_what_never_varies_is_known() -> None:
    exact = LogRatio(0.1, 0.0, 7)
    assert exact.above(0.05) == exact.below(0.2) == 0
    assert exact.above(0.2) == exact.below(0.05) == 1
    assert exact.above(0.1) == 0.5


def test_alarms_without_a_change_are_as_rare_as_promised() -> None:
    rng = np.random.default_rng(1)
    found = [estimate(hierarchical(rng, 8, 10), seed=n) for n in range(600)]
    for level in (0.05, 0.01):
        alarms = sum(each.above(0.0) < level for each in found)
        # 600 draws of a chance of `level`; 4 standard deviations above it is a fault.
        assert alarms <= 600 * level + 4 * math.sqrt(600 * level)


def test_a_change_is_found_as_often_as_its_standard_error_says() -> None:
    rng = np.random.default_rng(2)
    found = [estimate(hierarchical(rng, 12, 20) + 0.06, seed=n) for n in range(100)]
    assert sum(each.above(math.log(1.02)) < 0.0025 for each in found) >= 90
    assert np.mean([each.value for each in found]) == pytest.approx(0.06, abs=0.003)


def test_quiet_pairs_make_the_estimate_surer() -> None:
    rng = np.random.default_rng(3)
    noise = np.abs(rng.normal(0, 0.4, (16, 40))) * (rng.random((16, 40)) < 0.7)
    left, right = noise * rng.random((2, 16, 40)) + rng.normal(0, 0.02, (2, 16, 40))
    weighted = estimate(left - right, quietness(left, right))
    assert weighted.error < 0.8 * estimate(left - right).error
    assert abs(weighted.value) < 4 * weighted.error


def test_what_is_spent_adds_up_to_the_budget() -> None:
    looks = [0.0, 0.3, 0.4, 0.8, 1.0]
    steps = [spent(0.05, b) - spent(0.05, a) for a, b in itertools.pairwise(looks)]
    assert all(step > 0 for step in steps)
    assert sum(steps) == pytest.approx(0.05)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.001, 0.2))
def test_holm_rejects_what_every_intersection_rejects(chances: list[float], level: float) -> None:
    """Holm is the closure of Bonferroni's test: a hypothesis falls if all sets with it do."""
    every = range(len(chances))
    sets = [s for n in every for s in itertools.combinations(every, n + 1)]
    fallen = {s: min(chances[i] for i in s) < level / len(s) for s in sets}
    wanted = [all(fallen[s] for s in sets if index in s) for index in every]
    assert holm(chances, level) == wanted
