"""From blocks to a verdict: what is compared with what, and when it is known."""

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
"""Fresh processes of each side before anything is decided."""


@dataclass(frozen=True)
class Question:
    """Whether a metric of an artifact is within what is allowed.

    Args:
        artifact: Which one.
        metric: What is measured.
        allowance: How much larger than the baseline it may be: 0.05 is 5 %.
        most: The largest value allowed, instead of a baseline: seconds or bytes.
    """

    artifact: str
    metric: str
    allowance: float = 0.0
    most: float | None = None

    @property
    def bound(self) -> float:
        """The largest logarithm of the ratio that is allowed."""
        return math.log1p(self.allowance)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a question.

    Args:
        question: It.
        found: The logarithm of the ratio, candidate over baseline (or over the limit).
        control: The same of processes that run the same artifact; None where there are too few.
        baseline: Median of the baseline (or the limit), seconds or bytes.
        candidate: Median of the candidate.
        verdict: ``"open"`` until it is known.
        processes: Of each side, at least.
    """

    question: Question
    found: LogRatio
    control: LogRatio | None
    baseline: float
    candidate: float
    verdict: Verdict = "open"
    processes: int = 0

    @classmethod
    def refused(cls, question: Question) -> Evidence:
        """Return the answer where times cannot be compared."""
        nothing = LogRatio(0.0, math.inf, 0)
        return cls(
            question=question,
            found=nothing,
            control=None,
            baseline=math.nan,
            candidate=math.nan,
            verdict="refused",
        )

    @property
    def change(self) -> float:
        """How much larger the candidate is: 0.05 is 5 %."""
        return math.expm1(self.found.value)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the change lies with 95 %; None where too few processes tell."""
        low, high = self.found.interval()
        return None if math.isinf(high) else (math.expm1(low), math.expm1(high))

    @property
    def detectable(self) -> float | None:
        """The smallest change that the control could have told from none."""
        if self.control is None or math.isinf(self.control.detectable()):
            return None
        return math.expm1(self.control.detectable())


@dataclass(frozen=True)
class Look:
    """A look at the data while it grows.

    Args:
        before: Share of the time that had passed at the look before.
        now: Share of it that has passed.
    """

    before: float
    now: float

    def level(self, budget: float) -> float:
        """Return what this look may spend of an error budget."""
        return spent(budget, self.now) - spent(budget, self.before)


def ask(question: Question, found: Sequence[Measured], stored: Matrix | None = None) -> Evidence:
    """Return what the blocks say of a question, the verdict still open.

    Args:
        question: Which.
        found: What was measured.
        stored: Logarithms of blocks of a baseline from another time, where there is no other.
    """
    candidate = logarithms(found, CANDIDATE, question.metric)
    if question.most is not None:
        limit = np.full((1, 1), math.log(question.most))
        ratio = estimate(candidate - limit)
    elif stored is not None:
        limit, ratio = stored, difference(candidate, stored)
    else:
        limit = logarithms(found, BASELINE, question.metric)
        ratio = estimate(candidate - limit, quietness(candidate, limit))
    paired = stored is None and question.most is None
    sides = [limit, candidate] if paired else [candidate]
    middle, other = (math.exp(float(np.nanmedian(side))) for side in (limit, candidate))
    return Evidence(
        question=question,
        found=ratio,
        control=control(sides),
        baseline=middle,
        candidate=other,
        processes=len(candidate),
    )


def control(sides: Sequence[Matrix]) -> LogRatio | None:
    """Return how far processes of one side seem to be from each other, though nothing differs.

    The two processes of a side that took turns in a round are compared as the sides are.

    Args:
        sides: [processes, blocks] of each; every two rows are of one round.
    """
    one = np.concatenate([side[0::2] for side in sides])
    other = np.concatenate([side[1::2] for side in sides])
    return estimate(other - one, quietness(one, other), seed=1) if len(one) > 1 else None


def decide(answers: Sequence[Evidence], look: Look) -> list[Evidence]:
    """Return the answers with what is known at this look.

    A question fails where its ratio is above what is allowed, with the level that this look may
    spend, shared among all questions (Holm); and only where the control does not "fail" too. It
    passes where the ratio is below, each at a level of its own, because all have to pass.
    """
    alarm, miss = look.level(FALSE_ALARMS), look.level(MISSES)
    chances = [answer.found.above(answer.question.bound) for answer in answers]
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
    return "pass" if answer.found.below(answer.question.bound) < miss else "open"


def _unsteady(answer: Evidence) -> bool:
    """Whether processes of the same artifact differ by what is allowed."""
    if answer.control is None:
        return False
    away = replace(answer.control, value=abs(answer.control.value))
    return away.above(answer.question.bound) < FALSE_ALARMS
