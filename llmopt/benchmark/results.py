"""Results of a benchmark: raw samples, and the statistics derived from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from llmopt.benchmark.machine import MachineFingerprint
from llmopt.benchmark.statistics import median, median_interval, outliers, percentile

SCHEMA: Final = 1
_WITHIN_RUNS: Final = frozenset({"token_latency_s"})
"""Metrics with many samples per repetition. They are correlated, so an interval of the median that
assumes independence would be too narrow, and none is given."""


@dataclass(frozen=True)
class Metric:
    """A metric with its samples.

    Args:
        name: Name with the unit: ``"ttft_s"``, ``"decode_tokens_per_s"``, ``"peak_rss_bytes"``.
        samples: Measurements in order.
    """

    name: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the samples."""
        return median(self.samples)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the median; None for fewer than 6 independent samples."""
        return median_interval(self.samples) if self.independent else None

    @property
    def independent(self) -> bool:
        """Whether each sample comes from its own repetition."""
        return self.name not in _WITHIN_RUNS

    @property
    def outliers(self) -> tuple[int, ...]:
        """The indices of samples beyond the noise."""
        return outliers(self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Return the metric for JSON; percentiles that need more samples are null."""
        interval = self.interval
        return {
            "median": self.median,
            "interval_95": None if interval is None else list(interval),
            "p90": percentile(self.samples, 90),
            "p99": percentile(self.samples, 99),
            "outliers": list(self.outliers),
            "samples": list(self.samples),
        }


@dataclass(frozen=True)
class ArtifactResult:
    """The measurements of one artifact.

    Args:
        path: Path of the artifact, as the user spelled it.
        target: Target that it is compiled for.
        size_bytes: Size of all its files.
        metrics: Metrics in table order.
        warmup: Samples of the discarded repetitions, by metric.
        precision: Quantization scheme of the weights.
        compiled: Summary of its passes, from the manifest.
        roofline: Each phase against the machine's limits.
        profile: Time by module, for each phase.
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
        """Return the metric with this name; None if it was not measured."""
        return next((metric for metric in self.metrics if metric.name == name), None)


@dataclass(frozen=True)
class ResultRow:
    """A row of the table.

    Args:
        artifact: Path of the artifact.
        metric: Name of the metric, with the unit.
        median: The median of the samples.
        interval: The 95 % interval of the median; None for too few samples.
        count: Number of samples.
    """

    artifact: str
    metric: str
    median: float
    interval: tuple[float, float] | None
    count: int


@dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark of one workload.

    Args:
        workload: Workload as text.
        threads: Threads inside one operator.
        machine: Machine that it ran on.
        artifacts: Measurements of each artifact, in the user's order.
        warmups: Number of discarded repetitions.
        steady: Whether the samples show no trend; None if that was not tested.
        load_average: The machine's load average in the minute before.
        ceilings: Peak rates of this machine; empty if not measured.
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
        """Return the table, one row per artifact and metric."""
        return [
            ResultRow(
                artifact.path, metric.name, metric.median, metric.interval, len(metric.samples)
            )
            for artifact in self.artifacts
            for metric in artifact.metrics
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
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
                    "warmup": {name: list(samples) for name, samples in artifact.warmup.items()},
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
