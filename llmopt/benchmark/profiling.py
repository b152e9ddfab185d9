"""Where the time of a run goes: each operator's, added up by the source's modules."""

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
"""Decoded tokens of a round: sixteen steps with a past tell as much as sixty."""
_LAYER: Final = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Spent:
    """Time of one kind of operator in one module, for one run of a phase.

    Args:
        module: The source's module; empty where it is not known.
        op: The operator, as the engine calls it.
        calls: How often it ran.
        kernel_s: Inside the operators, the mean over runs.
        seconds: The same and what lies before each of them.
    """

    module: str
    op: str
    calls: int
    kernel_s: float
    seconds: float


@dataclass(frozen=True)
class PhaseProfile:
    """Where the time of a phase went.

    Args:
        phase: ``"prefill"``, ``"decode"``, ``"encode"`` or ``"run"``.
        runs: How many were added up.
        seconds: One run; profiling makes it longer.
        spent: By module and operator, the longest first.
    """

    phase: str
    runs: int
    seconds: float
    spent: tuple[Spent, ...]

    @property
    def attributed(self) -> float:
        """The share of the time that is known to belong to a module."""
        known = sum(each.seconds for each in self.spent if each.module)
        return known / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON, with the sums by part and by layer."""
        return {
            "phase": self.phase,
            "runs": self.runs,
            "seconds": self.seconds,
            "attributed": self.attributed,
            "kernel_s": sum(each.kernel_s for each in self.spent),
            "outside_s": self.seconds - sum(each.seconds for each in self.spent),
            "by_part": _added((part_of(each.module), each.seconds) for each in self.spent),
            "by_layer": _by_layer(self.spent),
            "operators": [asdict(each) for each in self.spent],
        }


def profile(path: Path, workload: Workload, threads: int | None = None) -> list[PhaseProfile]:
    """Return where the time of each phase of a workload goes; nothing where its engine is silent.

    Args:
        path: The artifact.
        workload: What is run.
        threads: Threads inside one operator; None for as many as the process may use.

    Raises:
        ArtifactError: It is damaged.
        LlmoptError: The engine's profile cannot be read.
    """
    runner = load(path, threads=threads)
    if not runner.session.profiles:
        return []
    if isinstance(workload, Generate):
        workload = replace(workload, decode=min(workload.decode, _STEPS))
    return _phases(runner, workload)


def _phases(runner: Runner, workload: Workload) -> list[PhaseProfile]:
    """Return the phases of several rounds, the first not counted."""

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
    return [phase_of(name, found) for name, found in parts.items()]


def _first_phase(workload: Workload) -> str:
    if isinstance(workload, Generate):
        return "prefill"
    return "encode" if isinstance(workload, Encode) else "run"


def phase_of(name: str, runs: Sequence[TimedRun]) -> PhaseProfile:
    """Return the mean of runs, operators of one kind and module added up."""
    found: dict[tuple[str, str], list[TimedOperator]] = defaultdict(list)
    for run in runs:
        for operator in run.operators:
            found[operator.module, operator.op].append(operator)
    count = len(runs)
    spent = [
        Spent(
            *key,
            calls=-(-len(operators) // count),
            kernel_s=sum(each.kernel_s for each in operators) / count,
            seconds=sum(each.seconds for each in operators) / count,
        )
        for key, operators in found.items()
    ]
    spent.sort(key=lambda each: -each.seconds)
    return PhaseProfile(name, count, sum(run.seconds for run in runs) / count, tuple(spent))


def part_of(module: str) -> str:
    """Return what part of the model a module belongs to: the same part of every layer is one.

    >>> part_of("layers.11.attention.qkv"), part_of("model.layers.3"), part_of("lm_head")
    ('layers.*.attention', 'model.layers.*', 'lm_head')
    """
    found = _LAYER.search(module)
    if found is None:
        return module
    inside = module[found.end() :].split(".")[1:2]
    return ".".join([module[: found.start()] + "*", *inside])


def layer_of(module: str) -> int | None:
    """Return the number of the layer that a module lies in, None where it lies in none.

    >>> layer_of("layers.11.attention"), layer_of("head")
    (11, None)
    """
    found = _LAYER.search(module)
    return None if found is None else int(found[0])


def _added(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the sum for each name, the largest first."""
    sums: dict[str, float] = defaultdict(float)
    for name, seconds in pairs:
        sums[name] += seconds
    return dict(sorted(sums.items(), key=lambda pair: -pair[1]))


def _by_layer(spent: Sequence[Spent]) -> list[Mapping[str, Any]]:
    """Return seconds by part for each layer, in order."""
    layers: dict[int, list[tuple[str, float]]] = defaultdict(list)
    for each in spent:
        number = layer_of(each.module)
        if number is not None:
            layers[number].append((part_of(each.module), each.seconds))
    return [{"layer": n, "parts": _added(layers[n])} for n in sorted(layers)]
