"""Profiles of a run: the time of each operator, summed over the source's modules."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from llmopt.benchmark.measuring import run_once
from llmopt.benchmark.workload import Encode, Generate, Workload
from llmopt.runtime import Runner, load
from llmopt.runtime.session import TimedOperator, TimedRun

_ROUNDS: Final = 3
_STEPS: Final = 17
"""Decoded tokens per round: the shares of sixteen steps are those of sixty."""
_LAYER: Final = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class OperatorTime:
    """The time of one kind of operator in one module, for one run of a phase.

    Args:
        module: Module of the source; empty if unknown.
        op: Name of the operator in the engine.
        calls: Calls per run.
        kernel_s: Time inside the operators, averaged over runs.
        seconds: The same with the gap before each operator.
    """

    module: str
    op: str
    calls: int
    kernel_s: float
    seconds: float


@dataclass(frozen=True)
class PhaseProfile:
    """The profile of a phase.

    Args:
        phase: ``"prefill"``, ``"decode"``, ``"encode"`` or ``"run"``.
        runs: Number of runs averaged.
        seconds: Duration of one run, profiling overhead included.
        operators: Times by module and operator, the longest first.
    """

    phase: str
    runs: int
    seconds: float
    operators: tuple[OperatorTime, ...]

    @property
    def attributed(self) -> float:
        """The share of the time that is attributed to a module."""
        known = sum(each.seconds for each in self.operators if each.module)
        return known / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the profile for JSON, with sums by part and by layer."""
        return {
            "phase": self.phase,
            "runs": self.runs,
            "seconds": self.seconds,
            "attributed": self.attributed,
            "kernel_s": sum(each.kernel_s for each in self.operators),
            "outside_s": self.seconds - sum(each.seconds for each in self.operators),
            "by_part": _summed((part_of(each.module), each.seconds) for each in self.operators),
            "by_layer": _by_layer(self.operators),
            "operators": [asdict(each) for each in self.operators],
        }


def profile(path: Path, workload: Workload, threads: int | None = None) -> list[PhaseProfile]:
    """Return the profile of each phase of a workload; none if the engine does not report times.

    Args:
        path: Directory of the artifact.
        workload: Workload to run.
        threads: Threads inside one operator; None for all usable cores.

    Raises:
        ArtifactError: The artifact is damaged.
        LlmoptError: The engine's profile cannot be read.
    """
    runner = load(path, threads=threads)
    if not runner.session.profiles:
        return []
    if isinstance(workload, Generate):
        workload = replace(workload, decode=min(workload.decode, _STEPS))
    return _phases(runner, workload)


def _phases(runner: Runner, workload: Workload) -> list[PhaseProfile]:
    """Return the phases of several rounds, after one warm-up round."""

    def work() -> None:
        for number in range(1 + _ROUNDS):
            run_once(runner, workload, np.random.default_rng(number))

    runs = runner.session.profiled(work)
    each = len(runs) // (1 + _ROUNDS)
    steps = workload.decode - 1 if isinstance(workload, Generate) else 0
    parts: dict[str, list[TimedRun]] = defaultdict(list)
    for number, run in enumerate(runs[each:]):
        is_step = number % each >= each - steps
        parts["decode" if is_step else _first_phase(workload)].append(run)
    return [phase_of(name, group) for name, group in parts.items()]


def _first_phase(workload: Workload) -> str:
    if isinstance(workload, Generate):
        return "prefill"
    return "encode" if isinstance(workload, Encode) else "run"


def phase_of(name: str, runs: Sequence[TimedRun]) -> PhaseProfile:
    """Return the mean of runs, summed over operators of the same kind and module."""
    groups: dict[tuple[str, str], list[TimedOperator]] = defaultdict(list)
    for run in runs:
        for operator in run.operators:
            groups[operator.module, operator.op].append(operator)
    count = len(runs)
    times = [
        OperatorTime(
            *key,
            calls=-(-len(operators) // count),
            kernel_s=sum(each.kernel_s for each in operators) / count,
            seconds=sum(each.seconds for each in operators) / count,
        )
        for key, operators in groups.items()
    ]
    times.sort(key=lambda each: -each.seconds)
    return PhaseProfile(name, count, sum(run.seconds for run in runs) / count, tuple(times))


def part_of(module: str) -> str:
    """Return the part of the model that a module belongs to, shared by all layers.

    >>> part_of("layers.11.attention.qkv"), part_of("model.layers.3"), part_of("lm_head")
    ('layers.*.attention', 'model.layers.*', 'lm_head')
    """
    layer = _LAYER.search(module)
    if layer is None:
        return module
    inside = module[layer.end() :].split(".")[1:2]
    return ".".join([module[: layer.start()] + "*", *inside])


def layer_of(module: str) -> int | None:
    """Return the number of the layer that a module belongs to, or None.

    >>> layer_of("layers.11.attention"), layer_of("head")
    (11, None)
    """
    layer = _LAYER.search(module)
    return None if layer is None else int(layer[0])


def _summed(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the sum of each name, the largest first."""
    sums: dict[str, float] = defaultdict(float)
    for name, seconds in pairs:
        sums[name] += seconds
    return dict(sorted(sums.items(), key=lambda pair: -pair[1]))


def _by_layer(times: Sequence[OperatorTime]) -> list[Mapping[str, Any]]:
    """Return the seconds of each part of each layer, in order."""
    layers: dict[int, list[tuple[str, float]]] = defaultdict(list)
    for each in times:
        number = layer_of(each.module)
        if number is not None:
            layers[number].append((part_of(each.module), each.seconds))
    return [{"layer": n, "parts": _summed(layers[n])} for n in sorted(layers)]
