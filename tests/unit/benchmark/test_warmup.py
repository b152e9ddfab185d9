"""Where a warm-up ends, and how many rounds are run until it is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.benchmark import Generate, MeasurePlan, measure
from llmopt.benchmark.statistics import outliers
from llmopt.benchmark.warmup import NEEDED, warmups_in

NOISE = st.lists(st.floats(0.99, 1.01), min_size=12, max_size=30)


@given(NOISE, st.integers(1, 4))
def test_a_slow_start_is_found(noise: list[float], slow: int) -> None:
    found = warmups_in([3.0 + number for number in range(slow)] + noise)
    assert found is None or found >= slow  # None: the noise itself may fall


def test_noise_alone_is_mostly_left_whole() -> None:
    rng = np.random.default_rng(0)
    found = [warmups_in(list(rng.normal(1.0, 0.05, 12))) for _ in range(500)]
    assert sum(count == 0 for count in found) > 250
    assert sum(count is None for count in found) < 75


def test_a_trend_to_the_end_is_no_end_of_a_warmup() -> None:
    assert warmups_in([float(20 - n) for n in range(20)]) is None


def test_few_samples_tell_nothing() -> None:
    assert warmups_in([1.0] * (NEEDED - 1)) is None
    assert warmups_in([1.0] * NEEDED) == 0


def _measured(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, seconds: list[float], repetitions: int
) -> Any:
    rounds = iter(seconds)
    monkeypatch.setattr(
        "llmopt.benchmark.measuring.run_once", lambda *_: {"ttft_s": [next(rounds)]}
    )
    plan = MeasurePlan(Generate(2, 2), threads=1, repetitions=repetitions, processes=0)
    return measure([artifact], plan)


def test_rounds_are_run_until_enough_are_steady(
    monkeypatch: pytest.MonkeyPatch, artifacts: Path
) -> None:
    steady = [1.0, 1.01] * 10
    result = _measured(monkeypatch, artifacts / "shared", [9.0, 5.0, *steady], 8)

    assert (result.warmups, result.steady) == (2, True)
    (artifact,) = result.artifacts
    assert artifact.metrics[0].samples == tuple(steady[:8])
    assert artifact.warmup["ttft_s"] == (9.0, 5.0)


def test_a_machine_that_never_settles_is_told_of(
    monkeypatch: pytest.MonkeyPatch, artifacts: Path
) -> None:
    falling = [float(100 - number) for number in range(26)]
    result = _measured(monkeypatch, artifacts / "shared", falling, 8)

    assert (result.warmups, result.steady) == (18, False)
    assert len(result.artifacts[0].metrics[0].samples) == 8


def test_where_too_little_is_asked_for_two_rounds_are_warmup(
    monkeypatch: pytest.MonkeyPatch, artifacts: Path
) -> None:
    result = _measured(monkeypatch, artifacts / "shared", [3.0, 2.0, 1.0], 1)
    assert (result.warmups, result.steady) == (2, None)


def test_outliers_are_flagged_by_number() -> None:
    assert outliers([1.0, 1.1, 0.9, 5.0, 1.05, 0.95]) == (3,)
    assert outliers([1.0] * 9 + [2.0]) == ()  # nothing says how wide the noise is
    assert outliers([1.0, 1.1, 9.0]) == ()
