"""Pairs to compare: a candidate, and its baseline artifact or stored baseline."""

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
"""Default allowances of metrics that vary more between processes than latencies do."""
GATED: Final = (TTFT, STEP, ENCODE, RUN, MEMORY)
"""Metrics gated by default; load time is not one, as it also depends on the disk."""
_PREFILL: Final = 8
_BATCH: Final = 1
"""Prompt tokens and batch size: smaller than those of `bench`, because a short block fits between
two time slices of other processes."""

Proxies = Literal["gate", "report", "only"]


@dataclass(frozen=True)
class CheckRequest:
    """The parameters of a check.

    Args:
        candidates: Artifacts to check.
        baseline: An artifact, a folder of artifacts with the same names, or a baseline file.
        allowances: Largest increase over the baseline by metric; ``""`` stands for latencies that
            are not named.
        metrics: Metrics to gate; empty for `GATED`.
        workload: Workload as text; None for the task's default.
        threads: Threads inside one operator; None for `gate_threads`.
        max_time_s: Time budget per artifact; open questions are inconclusive after it.
        proxies: Whether counts are gated, only reported, or gated alone.
        budgets: Budgets from ``llmopt.toml``.
        seed: Seed of the tokens.
        commands: Commands that start the workers, by side.
        trust: Signer required of each candidate, and of the baseline if it is a bundle.
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
        """Return the largest increase over the baseline that a metric of an artifact may have."""
        for budget in budgets_for(self.budgets, name):
            if budget.metric == metric and budget.max_regression is not None:
                return budget.max_regression
        if metric in self.allowances:
            return self.allowances[metric]
        if metric in ALLOWANCES:
            return ALLOWANCES[metric]
        return self.allowances.get("", ALLOWANCE) if metric in METRICS else 0.0


class Pair:
    """A candidate and its baseline.

    Args:
        request: Parameters of the check.
        candidate: Directory of the candidate, or a bundle.
        baseline: Path of the baseline, its stored measurements, or None if there is none yet.
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
        paths = {CANDIDATE: candidate}
        if isinstance(baseline, Path):
            baseline = artifact_of(baseline, request.trust if is_bundle(baseline) else None)
            self.before = Manifest.read(baseline)
            self.before.check_sizes(baseline)
            paths = {BASELINE: baseline, CANDIDATE: candidate}
        self.workload, threads = self._setup(request)
        tasks = {
            side: Task(path, str(self.workload), threads, request.commands.get(side, WORKER))
            for side, path in paths.items()
        }
        self.rounds = Rounds(tasks, request.seed)

    def _setup(self, request: CheckRequest) -> tuple[Workload, int | None]:
        """Return the workload and the number of threads: those of a stored baseline, if any."""
        requested = None if request.workload is None else parse_workload(request.workload)
        if self.stored is None:
            threads = request.threads or gate_threads()
            return requested or gate_workload(self.manifest), threads
        stored = parse_workload(self.stored.workload), self.stored.threads
        for value, recorded, option in (
            (requested, stored[0], "workload"),
            (request.threads, stored[1], "threads"),
        ):
            if value is not None and value != recorded:
                raise UsageError(
                    f"--{option} {value}: the baseline of {self.name} was measured with "
                    f"{recorded}; omit the option, or recreate the baseline with --update"
                )
        return stored

    def questions(self, request: CheckRequest) -> list[Question]:
        """Return the questions about its latencies and memory."""
        budgets = [b for b in budgets_for(request.budgets, self.name) if b.metric in METRICS]
        gated = {*(request.metrics or GATED)}
        gated |= {b.metric for b in budgets if b.max_regression is not None}
        metrics = measurable(self.workload)
        compared = [
            Question(self.name, metric, request.allowed(self.name, metric))
            for metric in metrics
            if metric in gated
        ]
        limited = [
            Question(self.name, b.metric, most=b.most)
            for b in budgets
            if b.most is not None and b.metric in metrics
        ]
        return compared + limited

    def ask(self, question: Question) -> Evidence:
        """Return the current evidence for a question."""
        stored = None
        if self.stored is not None and question.most is None:
            stored = logarithms(self.stored.measured, BASELINE, question.metric)
        return ask(question, self.rounds.measured, stored)

    def has(self, metric: str) -> bool:
        """Whether a metric was measured on both sides."""
        measured = [
            *self.rounds.measured,
            *(self.stored.measured if self.stored is not None else ()),
        ]
        return metric in metrics_of(measured)

    def inform(self, metric: str) -> Evidence:
        """Return the evidence for a metric that is not gated."""
        return self.ask(Question(self.name, metric))

    def changes(self, request: CheckRequest) -> list[proxies.ProxyChange]:
        """Return the changes of counts, and the limits of budgets on counts and quality."""
        allowed = {metric: request.allowed(self.name, metric) for metric in COUNTED}
        changes = proxies.compare(self.name, self.before, self.manifest, allowed)
        for budget in budgets_for(request.budgets, self.name):
            if budget.metric in (*COUNTED, *QUALITY):
                changes += proxies.limits(self.name, budget, self.before, self.manifest)
        return changes


def name_of(artifact: Path) -> str:
    """Return the name of an artifact, which is that of its directory."""
    return artifact.resolve().name


def gate_workload(manifest: Manifest) -> Workload:
    """Return the default workload of a check."""
    workload = default_workload(manifest.task, manifest.model.max_length)
    if isinstance(workload, Generate):
        return replace(workload, prefill=min(_PREFILL, workload.prefill))
    if isinstance(workload, Encode):
        return replace(workload, batch=_BATCH)
    return workload


def gate_threads() -> int:
    """Return the default number of threads of a check: all usable cores but one.

    A thread pool waits for its slowest thread. With a thread on every core, any other load stalls
    the pool; a spare core absorbs it.
    """
    return max(1, usable_cores() - 1)


def stored_of(baseline: Baseline, candidate: Path, path: Path) -> BaselineArtifact:
    """Return the stored baseline of an artifact.

    Raises:
        UsageError: The file has no artifact of that name.
    """
    name = name_of(candidate)
    if name in baseline.artifacts:
        return baseline.artifacts[name]
    names = ", ".join(baseline.artifacts)
    raise UsageError(
        f"{path}: no baseline of {name}, only of {names}; rename the artifact, "
        "or add it with --update"
    )


def _is_artifact(path: Path) -> bool:
    return (path / MANIFEST).is_file() or is_bundle(path)


def baseline_artifact(baseline: Path, candidate: Path, *, alone: bool) -> Path:
    """Return the artifact that a candidate is compared with.

    Args:
        baseline: Path of an artifact, or of a folder with one of the same name.
        candidate: Path of the candidate.
        alone: Whether there is only one candidate.

    Raises:
        SourceNotFoundError: The baseline does not exist.
        UsageError: One baseline is given for several candidates.
    """
    if _is_artifact(baseline):
        if alone:
            return baseline
        raise UsageError(
            f"{baseline}: a single artifact cannot be the baseline of several; "
            "give a folder with one of the same name for each"
        )
    artifact = baseline / name_of(candidate)
    if _is_artifact(artifact):
        return artifact
    raise SourceNotFoundError(
        artifact if baseline.exists() else baseline,
        "--baseline takes an artifact, a folder of artifacts with the same names, or a .json file",
    )
