"""What a benchmark found: raw samples, and what follows from them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

from llmopt.benchmark.machine import Machine
from llmopt.benchmark.statistics import median, median_interval, percentile

SCHEMA: Final = 1


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
        """Where the true median lies with 95 %; None for fewer than 6 samples."""
        return median_interval(self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON; percentiles that need more samples are null."""
        interval = self.interval
        return {
            "median": self.median,
            "interval_95": None if interval is None else list(interval),
            "p90": percentile(self.samples, 90),
            "p99": percentile(self.samples, 99),
            "samples": list(self.samples),
        }


@dataclass(frozen=True)
class ArtifactResult:
    """What was measured of one artifact.

    Args:
        path: The artifact, as it was given.
        target: What it is built for.
        size_bytes: All its files.
        metrics: In the order of the table.
    """

    path: str
    target: str
    size_bytes: int
    metrics: tuple[Metric, ...]

    def metric(self, name: str) -> Metric | None:
        """Return the metric of this name, None where it was not measured."""
        return next((metric for metric in self.metrics if metric.name == name), None)


@dataclass(frozen=True)
class Row:
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


@dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark of one workload.

    Args:
        workload: As text.
        threads: Threads inside one operator.
        machine: Where it ran.
        artifacts: In the order given; measured in turns.
        warmups: Repetitions before the first that counts.
    """

    workload: str
    threads: int
    machine: Machine
    artifacts: tuple[ArtifactResult, ...]
    warmups: int

    def rows(self) -> list[Row]:
        """Return the table, one line for each artifact and metric."""
        return [
            Row(artifact.path, metric.name, metric.median, metric.interval, len(metric.samples))
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
            "machine": asdict(self.machine) | {"fingerprint": self.machine.fingerprint},
            "artifacts": [
                {
                    "path": artifact.path,
                    "target": artifact.target,
                    "size_bytes": artifact.size_bytes,
                    "metrics": {metric.name: metric.to_dict() for metric in artifact.metrics},
                }
                for artifact in self.artifacts
            ],
        }

    def to_json(self) -> str:
        """Return the text of a result file."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
