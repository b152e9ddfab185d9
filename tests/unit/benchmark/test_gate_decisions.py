"""From blocks to verdicts."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from support.gate_samples import measured

from llmopt.benchmark.gate.decisions import Evidence, Look, Question, ask, decide
from llmopt.benchmark.gate.rounds import CANDIDATE, Measured, logarithms, metrics_of
from llmopt.benchmark.gate.statistics import LogRatio
from llmopt.errors import LlmoptError

STEP = "time_per_output_token_s"
LAST = Look(0.0, 1.0)


def verdict(found: list[Measured], allowance: float = 0.02, look: Look = LAST) -> str:
    return decide([ask(Question("a", STEP, allowance), found)], look)[0].verdict


def test_the_same_passes_slower_fails() -> None:
    assert verdict(measured()) == "pass"
    assert verdict(measured(factors={STEP: 1.05})) == "fail"
    assert verdict(measured(factors={STEP: 1.05}), allowance=0.10) == "pass"
    assert verdict(measured(factors={STEP: 0.8})) == "pass"


def test_noise_that_hides_the_answer_leaves_it_open() -> None:
    assert verdict(measured(rounds=4, noise=0.3), allowance=0.02) == "open"


def test_fewer_than_eight_processes_decide_nothing() -> None:
    assert verdict(measured(rounds=3, factors={STEP: 3.0})) == "open"
    assert verdict(measured(rounds=4, factors={STEP: 3.0})) == "fail"


def test_a_look_that_may_spend_nothing_decides_nothing() -> None:
    assert verdict(measured(factors={STEP: 1.5}), look=Look(0.5, 0.5)) == "open"


def test_what_the_answer_says_is_what_was_measured() -> None:
    answer = ask(Question("a", STEP, 0.02), measured(rounds=8, factors={STEP: 1.05}))
    assert answer.baseline == pytest.approx(0.008, rel=0.02)
    assert answer.change == pytest.approx(0.05, abs=0.01)
    assert answer.interval is not None
    assert answer.interval[0] < 0.05 < answer.interval[1]
    assert answer.processes == 16
    assert answer.detectable is not None
    assert 0 < answer.detectable < 0.05


def test_a_machine_whose_twins_differ_as_much_raises_no_alarm() -> None:
    """Every second process of a side is 20 % slower: so may be the candidate's, by chance."""
    found = [
        dataclasses.replace(
            m,
            blocks={
                k: tuple(
                    (x[0] * (1.2 if m.number else 1.0) * (1.1 if m.side == CANDIDATE else 1),)
                    for x in v
                )
                for k, v in m.blocks.items()
            },
        )
        for m in measured(rounds=8)
    ]
    assert verdict(found, allowance=0.05) == "open"


def test_several_questions_share_the_level() -> None:
    """What fails alone by a hair does not fail beside nineteen others that ask the same."""
    chance = 0.003  # of a value this high; the level is 0.005
    sure = LogRatio(0.05, 0.0, 7)
    while sure.above(0.0) < chance:
        sure = dataclasses.replace(sure, error=sure.error + 1e-4)
    question = Question("a", STEP, 0.0)
    one = Evidence(
        question=question, ratio=sure, control=None, baseline=1.0, candidate=1.05, processes=16
    )
    calm = dataclasses.replace(one, ratio=LogRatio(-1.0, 0.001, 7))
    assert [a.verdict for a in decide([one], LAST)] == ["fail"]
    assert [a.verdict for a in decide([one, *[calm] * 19], LAST)] == ["open", *["pass"] * 19]


def test_a_limit_needs_no_baseline() -> None:
    found = measured(sides=[CANDIDATE])
    for most, wanted in ((0.0076, "fail"), (0.0084, "pass")):
        answer = decide([ask(Question("a", STEP, most=most), found)], LAST)[0]
        assert answer.verdict == wanted
        assert answer.candidate == pytest.approx(0.008, rel=0.02)


def test_a_stored_baseline_is_compared_without_pairs() -> None:
    stored = logarithms(measured(seed=1), "baseline", STEP)
    for factor, wanted in ((1.0, "pass"), (1.2, "fail")):
        found = measured(factors={STEP: factor}, sides=[CANDIDATE], seed=2)
        assert decide([ask(Question("a", STEP, 0.05), found, stored)], LAST)[0].verdict == wanted


@pytest.mark.parametrize("sample", [math.nan, math.inf, 0.0, -1.0])
def test_samples_that_are_no_times_are_refused(sample: float) -> None:
    blocks = {STEP: ((0.1,), (sample,))}
    found = [dataclasses.replace(each, blocks=blocks) for each in measured(rounds=1)]
    with pytest.raises(LlmoptError, match=f"{STEP} of the candidate: a sample is not a positive"):
        logarithms(found, CANDIDATE, STEP)


def test_a_round_with_fewer_blocks_counts_as_what_it_has() -> None:
    found = [
        dataclasses.replace(m, blocks={k: v[: 3 + m.round] for k, v in m.blocks.items()})
        for m in measured(rounds=6, factors={STEP: 1.05})
    ]
    logs = logarithms(found, CANDIDATE, STEP)
    assert np.isfinite(logs).sum(axis=1).tolist() == [3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8]
    assert verdict(found) == "fail"


def test_a_process_that_measured_nothing_is_refused() -> None:
    found = [dataclasses.replace(each, blocks={STEP: ()}) for each in measured(rounds=1)]
    with pytest.raises(LlmoptError, match="not a positive number"):
        logarithms(found, CANDIDATE, STEP)
    with pytest.raises(LlmoptError, match="was not measured"):
        logarithms(found, CANDIDATE, "encode_latency_s")


def test_metrics_are_those_that_every_process_has() -> None:
    found = measured(rounds=1)
    assert metrics_of(found) == ["ttft_s", STEP, "load_s", "peak_rss_bytes"]
    found[0] = dataclasses.replace(found[0], blocks={STEP: ((0.1,),)})
    assert metrics_of(found) == [STEP]
    assert metrics_of([]) == []


def test_answers_of_other_machines_are_refused() -> None:
    answer = Evidence.refused(Question("a", STEP))
    assert answer.verdict == "refused"
    assert answer.interval is None
    assert answer.detectable is None
    assert np.isnan(answer.baseline)
