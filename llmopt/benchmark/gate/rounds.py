"""Measuring in rounds: fresh processes of both sides, alive together, with interleaved blocks."""

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
"""Measured metrics, in table order."""

BASELINE: Final = "baseline"
CANDIDATE: Final = "candidate"

_ORDERS: Final = ((0, 1, 3, 2), (2, 3, 1, 0), (1, 0, 2, 3), (3, 2, 0, 1))
"""Orders of baseline, candidate, baseline, candidate: each is ABBA, and together they balance the
position of each worker."""
_MIN_BLOCK_S: Final = 0.004
"""Shortest block: waking a worker takes some 0.2 ms."""
_WORKER_S: Final = 1.5
"""Time that a worker measures in one round; starting it takes about half of that."""
_TTFT_SHARE: Final = 0.5
"""The share of that time for first tokens."""
_MIN_STEPS: Final = 8
"""The fewest blocks of steps after a first token."""
_MAX_FIRST: Final = 32


@dataclass(frozen=True)
class Slot:
    """A block of each worker in a cycle.

    Args:
        metric: Metric to measure.
        count: Repetitions in the block.
    """

    metric: str
    count: int = 1


@dataclass(frozen=True)
class Measured:
    """The measurements of one process.

    Args:
        side: ``"baseline"`` or ``"candidate"``.
        round: Number of the round; its processes alternate.
        number: 0 or 1, the number of the process on its side.
        blocks: Samples of each block by metric; blocks with the same index in all processes of a
            round were measured back to back.
    """

    side: str
    round: int
    number: int
    blocks: Mapping[str, tuple[tuple[float, ...], ...]]

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements for JSON."""
        blocks = {metric: [list(b) for b in samples] for metric, samples in self.blocks.items()}
        return {
            "side": self.side,
            "round": self.round,
            "number": self.number,
            "blocks": blocks,
        }


class Rounds:
    """Rounds of measuring one candidate, against one baseline if there is one.

    Args:
        tasks: Task of each side; one round has two processes of each.
        seed: Seed of the tokens.
    """

    def __init__(self, tasks: Mapping[str, Task], seed: int = 0) -> None:
        self._sides = list(tasks)
        self._tasks = [task for _ in range(2) for task in tasks.values()]
        self._workload = parse_workload(self._tasks[0].workload)
        self._seed = seed
        self._cycle: list[Slot] = []
        self.measured: list[Measured] = []
        self.threads = 0
        self.durations_s: list[float] = []

    @property
    def count(self) -> int:
        """The number of measured rounds."""
        return self.measured[-1].round + 1 if self.measured else 0

    def measure(self) -> None:
        """Measure another round.

        Raises:
            LlmoptError: A process could not be started, or ended early.
        """
        start, number = time.perf_counter(), self.count
        orders = _ORDERS if len(self._tasks) == 4 else ((0, 1), (1, 0))
        with started(self._tasks, orders[number % len(orders)]) as workers:
            self.threads = workers[0].threads
            cycle = self._warm_up(workers, number)
            samples: list[dict[str, list[list[float]]]] = [{} for _ in workers]
            first = time.perf_counter()
            for step, slot in enumerate(itertools.cycle(cycle)):
                if step >= len(cycle) and time.perf_counter() - first > _WORKER_S * len(workers):
                    break
                seed = self._seed + 10_000 * number + step
                for index in orders[(number + step) % len(orders)]:
                    block = workers[index].block(slot.metric, slot.count, seed)
                    samples[index].setdefault(slot.metric, []).append(block)
            for index, worker in enumerate(workers):
                samples[index] |= _once(worker)
        self._keep(samples, number)
        self.durations_s.append(time.perf_counter() - start)

    def _warm_up(self, workers: Sequence[WorkerProcess], number: int) -> list[Slot]:
        """Run each metric once or twice on each worker, and return the cycle of blocks."""
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
        for index, metrics in enumerate(samples):
            side = self._sides[index % len(self._sides)]
            blocks = {metric: tuple(map(tuple, metrics[metric])) for metric in metrics}
            self.measured.append(Measured(side, number, index // len(self._sides), blocks))


def measurable(workload: Workload) -> list[str]:
    """Return the metrics of a workload."""
    if isinstance(workload, Generate):
        return [TTFT, *([STEP] if workload.decode > 1 else []), LOAD, MEMORY]
    return [RUN if isinstance(workload, Inputs) else ENCODE, LOAD, MEMORY]


def plan_cycle(workload: Workload, begin_s: float, step_s: float) -> list[Slot]:
    """Return the cycle of blocks that a round repeats until its time is over.

    Blocks are as short as possible, because a brief slowdown of the machine then covers both
    blocks of a pair rather than one; and two cycles fit in a round, so that it has samples of each
    metric wherever it ends.

    Args:
        workload: Workload to measure.
        begin_s: Approximate duration of a first token, or of another run.
        step_s: Approximate duration of each further token.

    >>> slots = plan_cycle(Generate(64, 64), 0.1, 0.008)
    >>> [slot.metric for slot in slots].count("ttft_s"), len(slots)
    (4, 51)
    """
    if not isinstance(workload, Generate) or workload.decode < 2:
        count = max(1, math.ceil(_MIN_BLOCK_S / begin_s))
        return [Slot(measurable(workload)[0], count)]
    count = min(max(1, math.ceil(_MIN_BLOCK_S / step_s)), workload.decode - 1)
    fitting = round(_WORKER_S / 2 * (1 - _TTFT_SHARE) / (step_s * count))
    blocks = min(max(_MIN_STEPS, fitting), (workload.decode - 1) // count)
    steps_s = blocks * count * step_s
    begins = min(max(1, round(steps_s * _TTFT_SHARE / (1 - _TTFT_SHARE) / begin_s)), _MAX_FIRST)
    return [Slot(TTFT)] * begins + [Slot(STEP, count)] * blocks


def _once(worker: WorkerProcess) -> dict[str, list[list[float]]]:
    """Return the metrics that each process measures once."""
    metrics = {LOAD: [[worker.load_s]]}
    if (peak := worker.peak_rss_bytes()) is not None:
        metrics[MEMORY] = [[float(peak)]]
    return metrics


def logarithms(measured: Sequence[Measured], side: str, metric: str) -> Matrix:
    """Return the log of the mean of each block: [processes, blocks], in round order.

    Rounds have as many blocks as their time allowed; shorter rows are padded with NaN.

    Raises:
        LlmoptError: A sample is not positive, or there are none.
    """
    rows = [m.blocks[metric] for m in measured if m.side == side and metric in m.blocks]
    if not rows:
        raise LlmoptError(f"{metric} of the {side} was not measured")
    logs = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, blocks in zip(logs, rows, strict=True):
        means = np.array([np.mean(block) if block else np.nan for block in blocks], np.float64)
        if not (blocks and np.isfinite(means).all() and (means > 0).all()):
            raise LlmoptError(f"{metric} of the {side}: a sample is not a positive number")
        row[: len(means)] = np.log(means)
    return logs


def metrics_of(measured: Sequence[Measured]) -> list[str]:
    """Return the metrics that every process measured, in table order."""
    return [m for m in METRICS if measured and all(m in each.blocks for each in measured)]
