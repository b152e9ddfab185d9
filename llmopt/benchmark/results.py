"""What a benchmark found: raw samples, and what follows from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from llmopt.benchmark.machine import MachineFingerprint
from llmopt.benchmark.statistics import median, median_interval, outliers, percentile

SCHEMA: Final = 1
_WITHIN_RUNS: Final = frozenset({"token_latency_s"})
"""Metrics with many samples a repetition. Those resemble each other: an interval of the median
that takes them for independent would be too narrow, so there is none."""


@dataclass(frozen=True)
class Metric:
    """One thing measured, several times.

    Args:
        name: With its unit: ``"ttft_s"``, ``"decode_tokens_per_s"``, ``"peak_rss_bytes"``.
        samples: Every measurement, in the order made.
    """

    name: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of the samples."""
        return median(self.samples)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the true median lies with 95 %; None for fewer than 6 independent samples."""
        return median_interval(self.samples) if self.independent else None

    @property
    def independent(self) -> bool:
        """Whether each sample is of a repetition of its own."""
        return self.name not in _WITHIN_RUNS

    @property
    def outliers(self) -> tuple[int, ...]:
        """Numbers of the samples that noise does not explain."""
        return outliers(self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON; percentiles that need more samples are null."""
        interval = self.interval
        return {
            "median": self.median,
            "interval_95": None if interval is None else list(interval),
            "p90": percentile(self.samples, 90),
            "p99": percentile(self.samples, 99),
            "outliers": list(self.outliers),
            "samples": list(self.samples),
        }


@dataclass(frozen=True, kw_only=True)
class ArtifactResult:
    """What was measured of one artifact.

    Args:
        path: The artifact, as it was given.
        target: What it is built for.
        size_bytes: All its files.
        metrics: In the order of the table.
        warmup: Samples of the repetitions that were left out, by metric.
        precision: The scheme of its weights.
        compiled: What its passes did, as the manifest says.
        roofline: How near to the machine's limits each phase came.
        profile: Where the time went, for each phase.
    """

    path: str
    target: str
    size_bytes: int
    metrics: tuple[Metric, ...]
    warmup: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    precision: str = ""
    compiled: Mapping[str, Any] = field(default_factory=dict)
    roofline: tuple[Mapping[str, Any], ...] = ()
    profile: tuple[Mapping[str, Any], ...] = ()

    def metric(self, name: str) -> Metric | None:
        """Return the metric of this name, None where it was not measured."""
        return next((metric for metric in self.metrics if metric.name == name), None)


@dataclass(frozen=True)
class ResultRow:
    """A line of the table.

    Args:
        artifact: Which one.
        metric: Its name, with the unit.
        median: The middle of the samples.
        interval: Where the true median lies with 95 %; None for too few samples.
        count: How many samples.
    """

    artifact: str
    metric: str
    median: float
    interval: tuple[float, float] | None
    count: int


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """A benchmark of one workload.

    Args:
        workload: As text.
        threads: Threads inside one operator.
        machine: Where it ran.
        artifacts: In the order given; measured in turns.
        warmups: Repetitions before the first that counts.
        steady: Whether no warm-up is left in the samples; None where it was not looked for.
        load_average: Of the machine, in the minute before.
        ceilings: What this machine reads and multiplies at most; empty where not measured.
    """

    workload: str
    threads: int
    machine: MachineFingerprint
    artifacts: tuple[ArtifactResult, ...]
    warmups: int
    steady: bool | None = None
    load_average: float | None = None
    ceilings: Mapping[str, Any] = field(default_factory=dict)

    def rows(self) -> list[ResultRow]:
        """Return the table, one line for each artifact and metric."""
        return [
            ResultRow(
                artifact.path, metric.name, metric.median, metric.interval, len(metric.samples)
            )
            for artifact in self.artifacts
            for metric in artifact.metrics
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "schema": SCHEMA,
            "workload": self.workload,
            "threads": self.threads,
            "warmups": self.warmups,
            "steady": self.steady,
            "load_average": self.load_average,
            "ceilings": dict(self.ceilings),
            "machine": asdict(self.machine) | {"fingerprint": self.machine.fingerprint},
            "artifacts": [
                {
                    "path": artifact.path,
                    "target": artifact.target,
                    "size_bytes": artifact.size_bytes,
                    "precision": artifact.precision,
                    "metrics": {metric.name: metric.to_dict() for metric in artifact.metrics},
                    "warmup": {name: list(found) for name, found in artifact.warmup.items()},
                    "compiled": dict(artifact.compiled),
                    "roofline": [dict(phase) for phase in artifact.roofline],
                    "profile": [dict(phase) for phase in artifact.profile],
                }
                for artifact in self.artifacts
            ],
        }

    def to_json(self) -> str:
        """Return the text of a result file."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
