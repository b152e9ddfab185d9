"""The check itself: compare counts, then measure in rounds until every question is decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from llmopt.benchmark.gate.baselines import (
    Baseline,
    BaselineArtifact,
    comparable,
    differences,
    read_baseline,
)
from llmopt.benchmark.gate.decisions import PROCESSES, Evidence, Look, decide
from llmopt.benchmark.gate.pairs import CheckRequest, Pair, baseline_artifact, name_of, stored_of
from llmopt.benchmark.gate.results import CheckResult, Recorded
from llmopt.benchmark.gate.rounds import BASELINE, Measured, measurable
from llmopt.benchmark.machine import this_machine
from llmopt.errors import UsageError
from llmopt.runtime.opening import is_bundle

Progress = Callable[[str], None]
_LOOK_AFTER: Final = 1.35
"""Growth of the elapsed time between two looks, because each look spends error budget."""


def check(request: CheckRequest, progress: Progress = lambda _: None) -> CheckResult:
    """Return the verdict on each candidate.

    Args:
        request: The check to run.
        progress: Callback for the name of each stage.

    Raises:
        LlmoptError: An artifact or a baseline cannot be read or compared, or a process ended.
    """
    pairs, refusal = _pairs(request)
    changes = [change for pair in pairs for change in pair.changes(request)]
    session = GateSession(pairs, request)
    if refusal:
        session.refuse()
    else:
        session.measure(progress)
    return CheckResult(
        baseline=str(request.baseline),
        machine=this_machine(),
        recorded=tuple(map(_recorded, pairs)),
        answers=tuple(session.answers),
        informed=tuple(session.informed()),
        changes=tuple(changes),
        proxies=request.proxies,
        refusal=refusal,
        later=any(pair.stored is not None for pair in pairs),
    )


def update(request: CheckRequest, progress: Progress = lambda _: None) -> Baseline:
    """Return a baseline of the candidates, measured now on this machine.

    Args:
        request: Candidates and the baseline file to write; its other artifacts are kept if they
            were measured on this machine.
        progress: Callback for the name of each stage.

    Raises:
        LlmoptError: An artifact cannot be read, does not fit the workload, or a process ended.
    """
    machine = comparable(this_machine())
    kept: Mapping[str, BaselineArtifact] = {}
    if request.baseline.exists():
        old = read_baseline(request.baseline)
        kept = old.artifacts if not differences(old.machine, machine) else {}
    measured: dict[str, BaselineArtifact] = {}
    for candidate in request.candidates:
        pair = Pair(request, candidate, None)
        while request.proxies != "only" and pair.rounds.count < PROCESSES:
            progress(f"{pair.name}: round {pair.rounds.count + 1} of {PROCESSES}")
            pair.rounds.measure()
        samples = tuple(dataclasses.replace(m, side=BASELINE) for m in pair.rounds.measured)
        measured[pair.name] = BaselineArtifact(
            str(pair.workload), pair.rounds.threads, pair.manifest, samples
        )
    return Baseline(machine, {**kept, **measured})


class GateSession:
    """The questions of a check, and the rounds of measuring that answer them.

    Args:
        pairs: Candidates with their baselines.
        request: The check to run.
    """

    def __init__(self, pairs: Sequence[Pair], request: CheckRequest) -> None:
        self._pairs = pairs
        self._request = request
        only = request.proxies == "only"
        self._questions = [(p, q) for p in pairs for q in ([] if only else p.questions(request))]
        if not self._questions and request.proxies == "report":
            raise UsageError(
                "nothing to gate: no gated metric fits the workload; name one with --metric"
            )
        self._open = list(range(len(self._questions)))
        self._answers: dict[int, Evidence] = {}
        self._last_look = 0.0

    @property
    def answers(self) -> list[Evidence]:
        """The evidence for each question, in order."""
        return [self._answers[index] for index in sorted(self._answers)]

    def refuse(self) -> None:
        """Refuse every question, because times are not comparable."""
        for index, (_, question) in enumerate(self._questions):
            self._answers[index] = Evidence.refused(question)

    def measure(self, progress: Progress) -> None:
        """Measure round by round until every question is answered, or the time is used up."""
        while self._open:
            for pair in self._unanswered():
                progress(f"{pair.name}: round {pair.rounds.count + 1}, {self._status()}")
                pair.rounds.measure()
            now, last = self._elapsed()
            if last or (self._ready() and now >= _LOOK_AFTER * self._last_look):
                self._look(Look(self._last_look, 1.0 if last else now))
                self._last_look = now
            if last or any(answer.verdict == "fail" for answer in self.answers):
                return

    def informed(self) -> list[Evidence]:
        """Return the evidence for metrics that are measured but not gated."""
        gated = {(q.artifact, q.metric) for _, q in self._questions if q.most is None}
        return [
            pair.inform(metric)
            for pair in self._pairs
            for metric in measurable(pair.workload)
            if pair.rounds.measured and (pair.name, metric) not in gated and pair.has(metric)
        ]

    def _unanswered(self) -> list[Pair]:
        return list(dict.fromkeys(self._questions[index][0] for index in self._open))

    def _ready(self) -> bool:
        return all(2 * pair.rounds.count >= PROCESSES for pair in self._unanswered())

    def _elapsed(self) -> tuple[float, bool]:
        """Return the elapsed share of the time, and whether the rest is too short for a round."""
        limit = self._request.max_time_s
        took = [pair.rounds.durations_s for pair in self._unanswered()]
        last = any(sum(each) + max(each) > limit for each in took)
        return max(map(sum, took)) / limit, last

    def _look(self, look: Look) -> None:
        still_open = [self._questions[index] for index in self._open]
        decided = decide([pair.ask(question) for pair, question in still_open], look)
        self._answers |= dict(zip(self._open, decided, strict=True))
        self._open = [i for i in self._open if self._answers[i].verdict == "open"]

    def _status(self) -> str:
        if not self._answers:
            return "no result yet"
        parts = []
        for answer in self.answers:
            low, high = answer.interval or (float("nan"), float("nan"))
            parts.append(f"{answer.question.metric} {100 * low:+.1f} … {100 * high:+.1f} %")
        return ", ".join(parts)


def _pairs(request: CheckRequest) -> tuple[list[Pair], str]:
    """Return the pairs to compare, and why their times are not comparable, or ""."""
    names = [name_of(candidate) for candidate in request.candidates]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"two artifacts are named {name}; rename one, or check them separately"
            )
    if not request.baseline.is_file() or is_bundle(request.baseline):
        alone = len(names) == 1
        pairs = [
            Pair(request, each, baseline_artifact(request.baseline, each, alone=alone))
            for each in request.candidates
        ]
        return pairs, ""
    baseline = read_baseline(request.baseline)
    stored = [stored_of(baseline, each, request.baseline) for each in request.candidates]
    pairs = [Pair(request, each, old) for each, old in zip(request.candidates, stored, strict=True)]
    refusal = differences(baseline.machine, comparable(this_machine()))
    if not refusal and request.proxies != "only" and not all(each.measured for each in stored):
        refusal = "the baseline has counts only"
    return pairs, "" if request.proxies == "only" else refusal


def _recorded(pair: Pair) -> Recorded:
    return Recorded(
        name=pair.name,
        path=str(pair.candidate),
        target=pair.manifest.target,
        workload=str(pair.workload),
        threads=pair.rounds.threads,
        rounds_s=tuple(pair.rounds.durations_s),
        measured=tuple(pair.rounds.measured) + _before(pair),
    )


def _before(pair: Pair) -> tuple[Measured, ...]:
    return () if pair.stored is None else pair.stored.measured
