"""What is compared with what: a candidate, and its baseline beside it or in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from llmopt.artifact.manifest import MANIFEST, Manifest
from llmopt.benchmark.gate import proxies
from llmopt.benchmark.gate.baselines import Baseline, BaselineArtifact
from llmopt.benchmark.gate.budgets import COUNTED, QUALITY, Budget, budgets_for
from llmopt.benchmark.gate.decisions import Evidence, Question, ask
from llmopt.benchmark.gate.process import WORKER, Task
from llmopt.benchmark.gate.rounds import (
    BASELINE,
    CANDIDATE,
    ENCODE,
    LOAD,
    MEMORY,
    METRICS,
    RUN,
    STEP,
    TTFT,
    Rounds,
    logarithms,
    measurable,
    metrics_of,
)
from llmopt.benchmark.workload import (
    Encode,
    Generate,
    Workload,
    default_workload,
    parse_workload,
)
from llmopt.bundle.signing import Trust
from llmopt.errors import SourceNotFoundError, UsageError
from llmopt.runtime.cores import usable_cores
from llmopt.runtime.opening import artifact_of, is_bundle

ALLOWANCE: Final = 0.05
ALLOWANCES: Final[Mapping[str, float]] = {MEMORY: 0.10, LOAD: 0.20}
"""Of what varies more from process to process than latencies do."""
GATED: Final = (TTFT, STEP, ENCODE, RUN, MEMORY)
"""What is gated where nothing is asked for; how long loading takes is up to the disk too."""
_PREFILL: Final = 8
_ROWS: Final = 1
"""Tokens of a prompt, and rows of a batch: fewer than `bench` takes, because between two slices of
a neighbour's time a short block fits."""

Proxies = Literal["gate", "report", "only"]


@dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """What to check.

    Args:
        candidates: Artifacts.
        baseline: An artifact, a folder of artifacts of the same names, or a baseline's file.
        allowances: How much larger than the baseline each metric may be; ``""`` stands for
            latencies that are not named.
        metrics: What is gated; none for `GATED`.
        workload: As text; None for one that fits.
        threads: Threads inside one operator; None for `gate_threads`.
        max_time_s: How long each artifact may be measured before it stays inconclusive.
        proxies: Whether counts are gated, only reported, or all that is gated.
        budgets: From ``llmopt.toml``.
        seed: Of the tokens.
        commands: What starts the workers, by side.
        trust: Whose signature each candidate has to have, and the baseline if it is a bundle.
    """

    candidates: tuple[Path, ...]
    baseline: Path
    allowances: Mapping[str, float] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    workload: str | None = None
    threads: int | None = None
    max_time_s: float = 120.0
    proxies: Proxies = "gate"
    budgets: tuple[Budget, ...] = ()
    seed: int = 0
    commands: Mapping[str, Sequence[str]] = field(default_factory=dict)
    trust: Trust | None = None

    def allowed(self, name: str, metric: str) -> float:
        """Return how much larger than the baseline a metric of an artifact may be."""
        for budget in budgets_for(self.budgets, name):
            if budget.metric == metric and budget.max_regression is not None:
                return budget.max_regression
        if metric in self.allowances:
            return self.allowances[metric]
        if metric in ALLOWANCES:
            return ALLOWANCES[metric]
        return self.allowances.get("", ALLOWANCE) if metric in METRICS else 0.0


class Pair:
    """A candidate and what it is compared with.

    Args:
        request: What to check.
        candidate: Its directory, or a bundle.
        baseline: The other artifact's, what was stored of it, or None where there is none yet.
    """

    def __init__(
        self, request: CheckRequest, candidate: Path, baseline: Path | BaselineArtifact | None
    ) -> None:
        self.name = name_of(candidate)
        candidate = artifact_of(candidate, request.trust)
        self.candidate = candidate
        self.manifest = Manifest.read(candidate)
        self.manifest.check_sizes(candidate)
        self.stored = baseline if isinstance(baseline, BaselineArtifact) else None
        self.before = self.stored.manifest if self.stored is not None else self.manifest
        places = {CANDIDATE: candidate}
        if isinstance(baseline, Path):
            baseline = artifact_of(baseline, request.trust if is_bundle(baseline) else None)
            self.before = Manifest.read(baseline)
            self.before.check_sizes(baseline)
            places = {BASELINE: baseline, CANDIDATE: candidate}
        self.workload, threads = self._how(request)
        tasks = {
            side: Task(place, str(self.workload), threads, request.commands.get(side, WORKER))
            for side, place in places.items()
        }
        self.rounds = Rounds(tasks, request.seed)

    def _how(self, request: CheckRequest) -> tuple[Workload, int | None]:
        """Return the workload and the threads: those of a stored baseline, if there is one."""
        asked = None if request.workload is None else parse_workload(request.workload)
        if self.stored is None:
            threads = request.threads or gate_threads()
            return asked or gate_workload(self.manifest), threads
        stored = parse_workload(self.stored.workload), self.stored.threads
        for wish, has, what in (
            (asked, stored[0], "workload"),
            (request.threads, stored[1], "threads"),
        ):
            if wish is not None and wish != has:
                raise UsageError(
                    f"--{what} {wish}: the baseline of {self.name} was measured with {has}; "
                    "leave the option out, or write the baseline anew with --update"
                )
        return stored

    def questions(self, request: CheckRequest) -> list[Question]:
        """Return what is asked of its times and memory."""
        budgets = [b for b in budgets_for(request.budgets, self.name) if b.metric in METRICS]
        asked = {*(request.metrics or GATED)}
        asked |= {b.metric for b in budgets if b.max_regression is not None}
        here = measurable(self.workload)
        compared = [
            Question(self.name, metric, request.allowed(self.name, metric))
            for metric in here
            if metric in asked
        ]
        limited = [
            Question(self.name, b.metric, most=b.most)
            for b in budgets
            if b.most is not None and b.metric in here
        ]
        return compared + limited

    def ask(self, question: Question) -> Evidence:
        """Return what is known of a question now."""
        stored = None
        if self.stored is not None and question.most is None:
            stored = logarithms(self.stored.measured, BASELINE, question.metric)
        return ask(question, self.rounds.found, stored)

    def has(self, metric: str) -> bool:
        """Whether a metric was measured, of both sides."""
        found = [*self.rounds.found, *(self.stored.measured if self.stored is not None else ())]
        return metric in metrics_of(found)

    def inform(self, metric: str) -> Evidence:
        """Return what is known of a metric that nothing is asked of."""
        return self.ask(Question(self.name, metric))

    def changes(self, request: CheckRequest) -> list[proxies.ProxyChange]:
        """Return the counts, and what budgets say of counts and of quality."""
        allowed = {metric: request.allowed(self.name, metric) for metric in COUNTED}
        found = proxies.compare(self.name, self.before, self.manifest, allowed)
        for budget in budgets_for(request.budgets, self.name):
            if budget.metric in (*COUNTED, *QUALITY):
                found += proxies.limits(self.name, budget, self.before, self.manifest)
        return found


def name_of(artifact: Path) -> str:
    """Return what an artifact is called: the name of its directory."""
    return artifact.resolve().name


def gate_workload(manifest: Manifest) -> Workload:
    """Return what a check measures when nothing is asked for."""
    found = default_workload(manifest.task, manifest.model.max_length)
    if isinstance(found, Generate):
        return replace(found, prefill=min(_PREFILL, found.prefill))
    if isinstance(found, Encode):
        return replace(found, batch=_ROWS)
    return found


def gate_threads() -> int:
    """Return how many threads a check measures with when nothing is asked for: all cores but one.

    A pool of threads waits for its slowest one. With a thread on every core, whatever else runs on
    the machine stops the whole pool; with a core left over it has one to run on.
    """
    return max(1, usable_cores() - 1)


def stored_of(baseline: Baseline, candidate: Path, path: Path) -> BaselineArtifact:
    """Return what a baseline's file holds of an artifact.

    Raises:
        UsageError: It holds others.
    """
    name = name_of(candidate)
    if name in baseline.artifacts:
        return baseline.artifacts[name]
    held = ", ".join(baseline.artifacts)
    raise UsageError(
        f"{path}: it holds {held}, and not {name}; give the artifact that name, "
        "or add it with --update"
    )


def _is_one(path: Path) -> bool:
    return (path / MANIFEST).is_file() or is_bundle(path)


def beside(baseline: Path, candidate: Path, *, alone: bool) -> Path:
    """Return the artifact that a candidate is compared with.

    Args:
        baseline: It, or a folder that holds one of the same name.
        candidate: The other.
        alone: Whether there is no other candidate.

    Raises:
        SourceNotFoundError: There is none.
        UsageError: One baseline is given for several candidates.
    """
    if _is_one(baseline):
        if alone:
            return baseline
        raise UsageError(
            f"{baseline}: one artifact cannot be the baseline of several; "
            "give the folder that holds one of the same name for each"
        )
    found = baseline / name_of(candidate)
    if _is_one(found):
        return found
    raise SourceNotFoundError(
        found if baseline.exists() else baseline,
        "--baseline takes an artifact, a folder of artifacts of the same names, or a .json file",
    )
