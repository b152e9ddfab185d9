"""The roofline of a run: its bytes and multiply-adds against the machine's ceilings.

A run takes at least the time to read its weights and caches, and at least the time to compute its
products; the larger of the two is the limit. The fraction of the limit is that time over the
measured one.
Source: S. Williams, A. Waterman, D. Patterson, Roofline: an insightful visual performance model
for multicore architectures, Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llmopt.benchmark.ceilings import Ceilings
from llmopt.benchmark.results import ArtifactResult
from llmopt.benchmark.workload import Encode, Generate, Workload


@dataclass(frozen=True)
class Phase:
    """The work of one phase of a workload.

    Args:
        name: ``"prefill"``, ``"decode"`` or ``"encode"``.
        metric: Name of the metric that times the phase.
        macs: Multiply-adds, by element type.
        read_bytes: Bytes of weights and caches.
        weight_bytes: Bytes of weights alone.
    """

    name: str
    metric: str
    macs: Mapping[str, int]
    read_bytes: int
    weight_bytes: int


def phases(work: Mapping[str, Any], workload: Workload) -> Iterator[Phase]:
    """Yield the phases of a workload, each with the work of one run.

    Args:
        work: Counts in the manifest (``llmopt.compiler.proxies``); an empty one has no phases.
        workload: Workload to run.
    """
    if not work:
        return
    if isinstance(workload, Encode):
        batch, length = workload.batch, workload.length
        pairs = batch * length * length
        yield _phase("encode", "encode_latency_s", work, (batch * length, batch, batch, pairs, 0))
    elif isinstance(workload, Generate):
        batch, new = workload.batch, workload.prefill
        pairs = batch * new * (new + 1) // 2
        yield _phase("prefill", "ttft_s", work, (batch * new, batch, batch, pairs, 0))
        if workload.decode > 1:
            # The middle step stands for all: the context grows by one token each.
            context = workload.prefill + workload.decode // 2
            counts = (batch, batch, batch, batch * context, batch * context)
            yield _phase("decode", "time_per_output_token_s", work, counts)


def _phase(
    name: str, metric: str, work: Mapping[str, Any], counts: tuple[int, int, int, int, int]
) -> Phase:
    tokens, kept, sequences, pairs, cached = counts
    rows = {"token": tokens, "kept": kept, "sequence": sequences}
    macs: Counter[str] = Counter()
    for often, products in work["products"].items():
        for dtype, count in products["macs"].items():
            macs[dtype] += rows[often] * count
    macs["float32"] += pairs * work["attention_macs"]
    weights = sum(products["weight_bytes"] for products in work["products"].values())
    weights += work["other_bytes"]
    read = weights + tokens * work["lookup_bytes"] + cached * work["cache_bytes"]
    return Phase(name, metric, dict(macs), read, weights)


@dataclass(frozen=True)
class Reached:
    """A phase against its limits.

    Args:
        phase: Name of the phase.
        seconds: Median duration.
        macs: Multiply-adds, by element type.
        read_bytes: Bytes of weights and caches.
        read_s: Shortest time to read them.
        multiply_s: Shortest time of the products; None if a ceiling is unknown.
        bound: Limiting resource: ``"memory"`` or ``"compute"``.
        fraction: The longer of the two times over the measured one.
        in_cache: Whether the weights fit in the last-level cache, so that memory does not bound
            repeated runs.
    """

    phase: str
    seconds: float
    macs: Mapping[str, int]
    read_bytes: int
    read_s: float
    multiply_s: float | None
    bound: str
    fraction: float
    in_cache: bool


def reached(
    work: Mapping[str, Any], workload: Workload, result: ArtifactResult, ceilings: Ceilings
) -> list[dict[str, Any]]:
    """Return each phase of a workload against its limits, for JSON."""
    rows = []
    for phase in phases(work, workload):
        metric = result.metric(phase.metric)
        if metric is not None:
            rows.append(asdict(_reached(phase, metric.median, ceilings)))
    return rows


def _reached(phase: Phase, seconds: float, ceilings: Ceilings) -> Reached:
    read_s = phase.read_bytes / ceilings.read_bytes_per_s
    multiply_s: float | None = 0.0
    for dtype, count in phase.macs.items():
        peak = ceilings.macs_per_s.get(dtype)
        multiply_s = None if peak is None or multiply_s is None else multiply_s + count / peak
    bound = "compute" if (multiply_s or 0.0) > read_s else "memory"
    return Reached(
        phase=phase.name,
        seconds=seconds,
        macs=phase.macs,
        read_bytes=phase.read_bytes,
        read_s=read_s,
        multiply_s=multiply_s,
        bound=bound,
        fraction=max(multiply_s or 0.0, read_s) / seconds,
        in_cache=bool(ceilings.cache_bytes and phase.weight_bytes <= ceilings.cache_bytes),
    )
