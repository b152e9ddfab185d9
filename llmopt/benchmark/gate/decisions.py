"""From blocks to a verdict: the comparison of both sides, and when it is conclusive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from llmopt.benchmark.gate.rounds import BASELINE, CANDIDATE, Measured, logarithms
from llmopt.benchmark.gate.statistics import (
    FALSE_ALARMS,
    MISSES,
    LogRatio,
    Matrix,
    difference,
    estimate,
    holm,
    quietness,
    spent,
)

Verdict = Literal["pass", "fail", "open", "refused"]
PROCESSES: Final = 8
"""Fresh processes per side before a verdict."""


@dataclass(frozen=True)
class Question:
    """The question whether a metric of an artifact is within its allowance.

    Args:
        artifact: Name of the artifact.
        metric: Name of the metric.
        allowance: Largest increase over the baseline: 0.05 is 5 %.
        most: Largest allowed value in seconds or bytes, instead of a baseline.
    """

    artifact: str
    metric: str
    allowance: float = 0.0
    most: float | None = None

    @property
    def bound(self) -> float:
        """The largest allowed logarithm of the ratio."""
        return math.log1p(self.allowance)


@dataclass(frozen=True)
class Evidence:
    """The evidence for the answer to a question.

    Args:
        question: The question.
        ratio: Log ratio of candidate over baseline (or over the limit).
        control: Log ratio of processes of the same artifact; None if there are too few.
        baseline: Median of the baseline (or the limit), in seconds or bytes.
        candidate: Median of the candidate.
        verdict: Verdict; ``"open"`` until it is conclusive.
        processes: Number of processes per side, at least.
    """

    question: Question
    ratio: LogRatio
    control: LogRatio | None
    baseline: float
    candidate: float
    verdict: Verdict = "open"
    processes: int = 0

    @classmethod
    def refused(cls, question: Question) -> Evidence:
        """Return the answer for times that are not comparable."""
        unknown = LogRatio(0.0, math.inf, 0)
        return cls(question, unknown, None, math.nan, math.nan, verdict="refused")

    @property
    def change(self) -> float:
        """The increase over the baseline: 0.05 is 5 %."""
        return math.expm1(self.ratio.value)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the change; None for too few processes."""
        low, high = self.ratio.interval()
        return None if math.isinf(high) else (math.expm1(low), math.expm1(high))

    @property
    def detectable(self) -> float | None:
        """The smallest change that the control could have detected."""
        if self.control is None or math.isinf(self.control.detectable()):
            return None
        return math.expm1(self.control.detectable())


@dataclass(frozen=True)
class Look:
    """An interim look at the data.

    Args:
        before: Elapsed share of the time at the previous look.
        now: Elapsed share of the time.
    """

    before: float
    now: float

    def level(self, budget: float) -> float:
        """Return the part of an error budget that this look may spend."""
        return spent(budget, self.now) - spent(budget, self.before)


def ask(question: Question, measured: Sequence[Measured], stored: Matrix | None = None) -> Evidence:
    """Return the evidence for a question, the verdict still open.

    Args:
        question: The question.
        measured: Measurements of all processes.
        stored: Logarithms of the blocks of a stored baseline, if there is no live one.
    """
    candidate = logarithms(measured, CANDIDATE, question.metric)
    if question.most is not None:
        limit = np.full((1, 1), math.log(question.most))
        ratio = estimate(candidate - limit)
    elif stored is not None:
        limit, ratio = stored, difference(candidate, stored)
    else:
        limit = logarithms(measured, BASELINE, question.metric)
        ratio = estimate(candidate - limit, quietness(candidate, limit))
    paired = stored is None and question.most is None
    sides = [limit, candidate] if paired else [candidate]
    middle, other = (math.exp(float(np.nanmedian(side))) for side in (limit, candidate))
    return Evidence(question, ratio, control(sides), middle, other, processes=len(candidate))


def control(sides: Sequence[Matrix]) -> LogRatio | None:
    """Return the apparent log ratio between processes of the same side: an A/A control.

    The two processes of a side that alternated in a round are compared as the sides are.

    Args:
        sides: [processes, blocks] per side; consecutive pairs of rows are of one round.
    """
    one = np.concatenate([side[0::2] for side in sides])
    other = np.concatenate([side[1::2] for side in sides])
    return estimate(other - one, quietness(one, other), seed=1) if len(one) > 1 else None


def decide(answers: Sequence[Evidence], look: Look) -> list[Evidence]:
    """Return the answers with their verdicts at this look.

    A question fails if its ratio is above the allowance, at the level that this look may spend,
    shared among all questions (Holm), and only if the control does not "fail" too. It passes if
    the ratio is below, each question at its own level, because all have to pass.
    """
    alarm, miss = look.level(FALSE_ALARMS), look.level(MISSES)
    chances = [answer.ratio.above(answer.question.bound) for answer in answers]
    failing = holm(chances, alarm)
    return [
        replace(answer, verdict=_verdict(answer, slower=slower, miss=miss))
        for answer, slower in zip(answers, failing, strict=True)
    ]


def _verdict(answer: Evidence, *, slower: bool, miss: float) -> Verdict:
    if answer.processes < PROCESSES:
        return "open"
    if slower:
        return "open" if _unsteady(answer) else "fail"
    return "pass" if answer.ratio.below(answer.question.bound) < miss else "open"


def _unsteady(answer: Evidence) -> bool:
    """Whether processes of the same artifact differ by more than the allowance."""
    if answer.control is None:
        return False
    away = replace(answer.control, value=abs(answer.control.value))
    return away.above(answer.question.bound) < FALSE_ALARMS
