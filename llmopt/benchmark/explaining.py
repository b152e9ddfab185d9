"""Interpretation of a benchmark: the roofline of each phase, and its profile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llmopt.artifact.manifest import Manifest
from llmopt.benchmark.ceilings import measure_ceilings
from llmopt.benchmark.measuring import MeasurePlan
from llmopt.benchmark.profiling import profile
from llmopt.benchmark.results import BenchmarkResult
from llmopt.benchmark.roofline import phases, reached
from llmopt.runtime.opening import artifact_of


def explain(
    result: BenchmarkResult,
    plan: MeasurePlan,
    progress: Callable[[str], None] = lambda _: None,
    *,
    profiled: bool = False,
) -> BenchmarkResult:
    """Return a result with this machine's ceilings and the roofline of each phase.

    Args:
        result: Benchmark to interpret.
        plan: Plan that it was measured with.
        progress: Callback for the name of each stage.
        profiled: Whether to profile each artifact too; the profile of an engine that does not
            report operator times stays empty.
    """
    works = [Manifest.read(artifact_of(Path(artifact.path))).work for artifact in result.artifacts]
    kinds = {
        dtype for work in works for phase in phases(work, plan.workload) for dtype in phase.macs
    }
    if kinds:
        progress("measuring this machine's peak rates")
        ceilings = measure_ceilings(result.threads, frozenset(kinds))
        limited = tuple(
            replace(artifact, roofline=tuple(reached(work, plan.workload, artifact, ceilings)))
            for artifact, work in zip(result.artifacts, works, strict=True)
        )
        result = replace(result, artifacts=limited, ceilings=ceilings.to_dict())
    if not profiled:
        return result
    with_profiles = []
    for artifact in result.artifacts:
        progress(f"profiling {artifact.path}")
        phases_ = profile(artifact_of(Path(artifact.path)), plan.workload, plan.threads)
        with_profiles.append(replace(artifact, profile=tuple(p.to_dict() for p in phases_)))
    return replace(result, artifacts=tuple(with_profiles))
