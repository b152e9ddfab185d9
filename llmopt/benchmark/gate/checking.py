"""The check itself: count, then measure in rounds until every question has an answer."""

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
from llmopt.benchmark.gate.pairs import CheckRequest, Pair, beside, name_of, stored_of
from llmopt.benchmark.gate.results import CheckResult, Recorded
from llmopt.benchmark.gate.rounds import BASELINE, Measured, measurable
from llmopt.benchmark.machine import this_machine
from llmopt.errors import UsageError
from llmopt.runtime.opening import is_bundle

Progress = Callable[[str], None]
_LOOK_AFTER: Final = 1.35
"""How many times longer a check has to have run before it looks again: looks are paid for."""


def check(request: CheckRequest, progress: Progress = lambda _: None) -> CheckResult:
    """Return the verdict on each candidate.

    Args:
        request: What to check.
        progress: Told what is being done.

    Raises:
        LlmoptError: An artifact or a baseline cannot be read or compared, or a process ended.
    """
    pairs, refusal = _pairs(request)
    changes = [change for pair in pairs for change in pair.changes(request)]
    asking = Asking(pairs, request)
    if refusal:
        asking.refuse()
    else:
        asking.measure(progress)
    return CheckResult(
        baseline=str(request.baseline),
        machine=this_machine(),
        recorded=tuple(map(_recorded, pairs)),
        answers=tuple(asking.answers),
        informed=tuple(asking.informed()),
        changes=tuple(changes),
        proxies=request.proxies,
        refusal=refusal,
        later=any(pair.stored is not None for pair in pairs),
    )


def update(request: CheckRequest, progress: Progress = lambda _: None) -> Baseline:
    """Return a baseline of what the candidates take now, on this machine.

    Args:
        request: What to measure; its baseline is the file that is to be written, and what that
            holds of other artifacts is kept if this is the same machine.
        progress: Told what is being done.

    Raises:
        LlmoptError: An artifact cannot be read, does not fit the workload, or a process ended.
    """
    machine = comparable(this_machine())
    kept: Mapping[str, BaselineArtifact] = {}
    if request.baseline.exists():
        old = read_baseline(request.baseline)
        kept = old.artifacts if not differences(old.machine, machine) else {}
    found: dict[str, BaselineArtifact] = {}
    for candidate in request.candidates:
        pair = Pair(request, candidate, None)
        while request.proxies != "only" and pair.rounds.count < PROCESSES:
            progress(f"{pair.name}: round {pair.rounds.count + 1} of {PROCESSES}")
            pair.rounds.measure()
        measured = tuple(dataclasses.replace(m, side=BASELINE) for m in pair.rounds.found)
        found[pair.name] = BaselineArtifact(
            str(pair.workload), pair.rounds.threads, pair.manifest, measured
        )
    return Baseline(machine, {**kept, **found})


class Asking:
    """Questions, and rounds of measuring until they are answered.

    Args:
        pairs: What is compared.
        request: What is asked of them.
    """

    def __init__(self, pairs: Sequence[Pair], request: CheckRequest) -> None:
        self._pairs = pairs
        self._request = request
        only = request.proxies == "only"
        self._asked = [(p, q) for p in pairs for q in ([] if only else p.questions(request))]
        if not self._asked and request.proxies == "report":
            raise UsageError(
                "nothing is gated: no metric fits the workload; name one with --metric"
            )
        self._open = list(range(len(self._asked)))
        self._found: dict[int, Evidence] = {}
        self._looked = 0.0

    @property
    def answers(self) -> list[Evidence]:
        """What is known of each question, in order."""
        return [self._found[index] for index in sorted(self._found)]

    def refuse(self) -> None:
        """Answer nothing: the machine is another."""
        for index, (_, question) in enumerate(self._asked):
            self._found[index] = Evidence.refused(question)

    def measure(self, progress: Progress) -> None:
        """Measure round by round until every question is answered, or there is no time left."""
        while self._open:
            for pair in self._unanswered():
                progress(f"{pair.name}: round {pair.rounds.count + 1}, {self._told()}")
                pair.rounds.measure()
            now, last = self._time()
            if last or (self._ready() and now >= _LOOK_AFTER * self._looked):
                self._look(Look(self._looked, 1.0 if last else now))
                self._looked = now
            if last or any(answer.verdict == "fail" for answer in self.answers):
                return

    def informed(self) -> list[Evidence]:
        """Return what was measured, and is not gated."""
        asked = {(q.artifact, q.metric) for _, q in self._asked if q.most is None}
        return [
            pair.inform(metric)
            for pair in self._pairs
            for metric in measurable(pair.workload)
            if pair.rounds.found and (pair.name, metric) not in asked and pair.has(metric)
        ]

    def _unanswered(self) -> list[Pair]:
        return list(dict.fromkeys(self._asked[index][0] for index in self._open))

    def _ready(self) -> bool:
        return all(2 * pair.rounds.count >= PROCESSES for pair in self._unanswered())

    def _time(self) -> tuple[float, bool]:
        """Return the share of the time that has passed, and whether there is none for a round."""
        most = self._request.max_time_s
        took = [pair.rounds.took_s for pair in self._unanswered()]
        last = any(sum(each) + max(each) > most for each in took)
        return max(map(sum, took)) / most, last

    def _look(self, look: Look) -> None:
        asked = [self._asked[index] for index in self._open]
        decided = decide([pair.ask(question) for pair, question in asked], look)
        self._found |= dict(zip(self._open, decided, strict=True))
        self._open = [i for i in self._open if self._found[i].verdict == "open"]

    def _told(self) -> str:
        if not self._found:
            return "nothing known yet"
        words = []
        for answer in self.answers:
            low, high = answer.interval or (float("nan"), float("nan"))
            words.append(f"{answer.question.metric} {100 * low:+.1f} … {100 * high:+.1f} %")
        return ", ".join(words)


def _pairs(request: CheckRequest) -> tuple[list[Pair], str]:
    """Return what is compared, and why times cannot be."""
    names = [name_of(candidate) for candidate in request.candidates]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"two artifacts are called {name}; rename one, or check them one by one"
            )
    if not request.baseline.is_file() or is_bundle(request.baseline):
        alone = len(names) == 1
        found = [
            Pair(request, each, beside(request.baseline, each, alone=alone))
            for each in request.candidates
        ]
        return found, ""
    baseline = read_baseline(request.baseline)
    stored = [stored_of(baseline, each, request.baseline) for each in request.candidates]
    pairs = [Pair(request, each, old) for each, old in zip(request.candidates, stored, strict=True)]
    refusal = differences(baseline.machine, comparable(this_machine()))
    if not refusal and request.proxies != "only" and not all(each.measured for each in stored):
        refusal = "the baseline holds counts alone"
    return pairs, "" if request.proxies == "only" else refusal


def _recorded(pair: Pair) -> Recorded:
    return Recorded(
        name=pair.name,
        path=str(pair.candidate),
        target=pair.manifest.target,
        workload=str(pair.workload),
        threads=pair.rounds.threads,
        rounds_s=tuple(pair.rounds.took_s),
        measured=tuple(pair.rounds.found) + _before(pair),
    )


def _before(pair: Pair) -> tuple[Measured, ...]:
    return () if pair.stored is None else pair.stored.measured
