"""Measuring in rounds: fresh processes of both sides, alive together, taking turns in blocks."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from llmopt.benchmark.gate.process import Task, WorkerProcess, started
from llmopt.benchmark.gate.statistics import Matrix
from llmopt.benchmark.workload import Generate, Inputs, Workload, parse_workload
from llmopt.errors import LlmoptError

TTFT: Final = "ttft_s"
STEP: Final = "time_per_output_token_s"
ENCODE: Final = "encode_latency_s"
RUN: Final = "run_latency_s"
LOAD: Final = "load_s"
MEMORY: Final = "peak_rss_bytes"
METRICS: Final = (TTFT, STEP, ENCODE, RUN, LOAD, MEMORY)
"""In the order of tables."""

BASELINE: Final = "baseline"
CANDIDATE: Final = "candidate"

_ORDERS: Final = ((0, 1, 3, 2), (2, 3, 1, 0), (1, 0, 2, 3), (3, 2, 0, 1))
"""Of baseline, candidate, baseline, candidate: each order is ABBA, and all of them together
place each worker equally often."""
_SHORTEST_S: Final = 0.004
"""Of a block: waking a worker takes some 0.2 ms."""
_TURN_S: Final = 1.5
"""What one worker measures in one round; starting it takes about half of that."""
_BEGINS: Final = 0.5
"""The share of it that first tokens get."""
_STEPS: Final = 8
"""The fewest blocks of steps after a first token."""
_MOST_BEGINS: Final = 32


@dataclass(frozen=True)
class Slot:
    """One turn of each worker.

    Args:
        metric: What is measured.
        count: Repetitions in a block.
    """

    metric: str
    count: int = 1


@dataclass(frozen=True)
class Measured:
    """What one process measured.

    Args:
        side: ``"baseline"`` or ``"candidate"``.
        round: In which round; those of a round took turns.
        number: 0 or 1, of its side in this round.
        blocks: By metric, the blocks, each with every sample: those of the same place in all
            processes of a round were made one right after the other.
    """

    side: str
    round: int
    number: int
    blocks: Mapping[str, tuple[tuple[float, ...], ...]]

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        blocks = {metric: [list(b) for b in found] for metric, found in self.blocks.items()}
        return {
            "side": self.side,
            "round": self.round,
            "number": self.number,
            "blocks": blocks,
        }


class Rounds:
    """Rounds of measuring one candidate, against one baseline if there is one.

    Args:
        tasks: By side; one round has two processes of each.
        seed: Of the tokens.
    """

    def __init__(self, tasks: Mapping[str, Task], seed: int = 0) -> None:
        self._sides = list(tasks)
        self._tasks = [task for _ in range(2) for task in tasks.values()]
        self._workload = parse_workload(self._tasks[0].workload)
        self._seed = seed
        self._cycle: list[Slot] = []
        self.found: list[Measured] = []
        self.threads = 0
        self.took_s: list[float] = []

    @property
    def count(self) -> int:
        """How many rounds have been measured."""
        return self.found[-1].round + 1 if self.found else 0

    def measure(self) -> None:
        """Measure one round more.

        Raises:
            LlmoptError: A process could not be started, or ended.
        """
        start, number = time.perf_counter(), self.count
        orders = _ORDERS if len(self._tasks) == 4 else ((0, 1), (1, 0))
        with started(self._tasks, orders[number % len(orders)]) as workers:
            self.threads = workers[0].threads
            cycle = self._warmed_up(workers, number)
            samples: list[dict[str, list[list[float]]]] = [{} for _ in workers]
            begun = time.perf_counter()
            for turn, slot in enumerate(itertools.cycle(cycle)):
                if turn >= len(cycle) and time.perf_counter() - begun > _TURN_S * len(workers):
                    break
                seed = self._seed + 10_000 * number + turn
                for index in orders[(number + turn) % len(orders)]:
                    block = workers[index].block(slot.metric, slot.count, seed)
                    samples[index].setdefault(slot.metric, []).append(block)
            for index, worker in enumerate(workers):
                samples[index] |= _once(worker)
        self._keep(samples, number)
        self.took_s.append(time.perf_counter() - start)

    def _warmed_up(self, workers: Sequence[WorkerProcess], number: int) -> list[Slot]:
        """Let each worker do everything once or twice; return what is measured again and again."""
        first = measurable(self._workload)[0]
        seed = self._seed + 10_000 * number + 9_999
        took = [worker.block(first, 2, seed)[-1] for worker in workers]
        steps = [0.0]
        if isinstance(self._workload, Generate) and self._workload.decode > 1:
            count = min(4, self._workload.decode - 1)
            steps = [min(worker.block(STEP, count, seed)) for worker in workers]
        if not self._cycle:
            self._cycle = plan_cycle(self._workload, min(took), min(steps))
        return self._cycle

    def _keep(self, samples: Sequence[Mapping[str, list[list[float]]]], number: int) -> None:
        for index, found in enumerate(samples):
            side = self._sides[index % len(self._sides)]
            blocks = {metric: tuple(map(tuple, found[metric])) for metric in found}
            self.found.append(Measured(side, number, index // len(self._sides), blocks))


def measurable(workload: Workload) -> list[str]:
    """Return the metrics that a workload has."""
    if isinstance(workload, Generate):
        return [TTFT, *([STEP] if workload.decode > 1 else []), LOAD, MEMORY]
    return [RUN if isinstance(workload, Inputs) else ENCODE, LOAD, MEMORY]


def plan_cycle(workload: Workload, begin_s: float, step_s: float) -> list[Slot]:
    """Return the blocks that a round measures again and again until its time is over.

    What slows the machine down for a second slows down both blocks of a short pair, and only one
    of a long one, so that blocks are as short as can be; and two cycles fit into a round, so that
    it has some of each metric wherever it ends.

    Args:
        workload: What is measured.
        begin_s: How long a first token, or another run, takes about.
        step_s: How long each token after it takes about.

    >>> slots = plan_cycle(Generate(64, 64), 0.1, 0.008)
    >>> [slot.metric for slot in slots].count("ttft_s"), len(slots)
    (4, 51)
    """
    if not isinstance(workload, Generate) or workload.decode < 2:
        count = max(1, math.ceil(_SHORTEST_S / begin_s))
        return [Slot(measurable(workload)[0], count)]
    count = min(max(1, math.ceil(_SHORTEST_S / step_s)), workload.decode - 1)
    fitting = round(_TURN_S / 2 * (1 - _BEGINS) / (step_s * count))
    blocks = min(max(_STEPS, fitting), (workload.decode - 1) // count)
    steps_s = blocks * count * step_s
    begins = min(max(1, round(steps_s * _BEGINS / (1 - _BEGINS) / begin_s)), _MOST_BEGINS)
    return [Slot(TTFT)] * begins + [Slot(STEP, count)] * blocks


def _once(worker: WorkerProcess) -> dict[str, list[list[float]]]:
    """Return what each process measures once."""
    found = {LOAD: [[worker.load_s]]}
    if (peak := worker.peak_rss_bytes()) is not None:
        found[MEMORY] = [[float(peak)]]
    return found


def logarithms(found: Sequence[Measured], side: str, metric: str) -> Matrix:
    """Return log of the mean of each block: [processes, blocks], in the order of the rounds.

    Rounds have as many blocks as there was time for; where one has fewer than others, NaN stands.

    Raises:
        LlmoptError: A sample is no positive number, or there is none.
    """
    rows = [m.blocks[metric] for m in found if m.side == side and metric in m.blocks]
    if not rows:
        raise LlmoptError(f"{metric} of the {side}: it was not measured")
    logs = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, blocks in zip(logs, rows, strict=True):
        means = np.array([np.mean(block) if block else np.nan for block in blocks], np.float64)
        if not (blocks and np.isfinite(means).all() and (means > 0).all()):
            raise LlmoptError(f"{metric} of the {side}: a sample is not a positive number")
        row[: len(means)] = np.log(means)
    return logs


def metrics_of(found: Sequence[Measured]) -> list[str]:
    """Return what every process measured, in the order that tables have it."""
    return [m for m in METRICS if found and all(m in each.blocks for each in found)]
