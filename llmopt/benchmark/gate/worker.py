"""A fresh process that runs blocks of a workload on request: ``python -m`` this module.

It reports on stdout that it is ready, then answers each line on stdin with one on stdout, all JSON
objects: the first loads the artifact, others run a block (`Worker.block`) or report peak memory. It
ends with stdin.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np

from llmopt.benchmark.measuring import check_fits, random_tokens
from llmopt.benchmark.probe import peak_rss_bytes
from llmopt.benchmark.workload import Encode, Generate, Inputs, Workload, parse_workload
from llmopt.interface.arrays import Array
from llmopt.runtime import Runner, load
from llmopt.runtime.generation import capacity_for
from llmopt.runtime.npz import read_npz
from llmopt.runtime.steps import Sequences

_DEATH_SIGNAL: Final = 1  # PR_SET_PDEATHSIG, see prctl(2)


class Worker:
    """A loaded artifact that is running a workload.

    Args:
        runner: Loaded artifact.
        workload: Workload to run.
    """

    def __init__(self, runner: Runner, workload: Workload) -> None:
        self._runner = runner
        self._workload = workload
        self._sequences: Sequences | None = None
        self._chosen: Any = None
        self._feeds = read_npz(Path(workload.path)) if isinstance(workload, Inputs) else {}

    def block(self, metric: str, count: int, seed: int) -> list[float]:
        """Return the durations of ``count`` repetitions of what ``metric`` measures.

        Args:
            metric: ``"ttft_s"`` begins a sequence for each repetition;
                ``"time_per_output_token_s"`` continues the last; ``"encode_latency_s"``;
                ``"run_latency_s"``.
            count: Number of repetitions.
            seed: Seed of the tokens.
        """
        random = np.random.default_rng(seed)
        if metric == "time_per_output_token_s":
            return [self._step() for _ in range(count)]
        if metric == "run_latency_s":
            return [self._run(self._feeds) for _ in range(count)]
        once = self._begin if metric == "ttft_s" else self._encode
        return [once(random) for _ in range(count)]

    def _begin(self, random: np.random.Generator) -> float:
        workload = self._workload
        assert isinstance(workload, Generate)
        tokens = random_tokens(self._runner, (workload.batch, workload.prefill), random)
        total = workload.prefill + workload.decode
        capacity = capacity_for(total, self._runner.manifest.model.max_length)
        start = time.perf_counter()
        self._sequences = Sequences(self._runner.session, workload.batch, capacity)
        self._chosen = self._sequences.extend(tokens)[:, -1].argmax(axis=-1)
        return time.perf_counter() - start

    def _step(self) -> float:
        assert self._sequences is not None
        start = time.perf_counter()
        self._chosen = self._sequences.extend(self._chosen[:, None])[:, -1].argmax(axis=-1)
        return time.perf_counter() - start

    def _encode(self, random: np.random.Generator) -> float:
        workload = self._workload
        assert isinstance(workload, Encode)
        port = self._runner.session.need("tokens")
        tokens = random_tokens(self._runner, (workload.batch, workload.length), random)
        return self._run({port.name: tokens.astype(port.dtype)})

    def _run(self, feeds: dict[str, Array]) -> float:
        start = time.perf_counter()
        self._runner.run(feeds)
        return time.perf_counter() - start


def main(request: str, commands: TextIO = sys.stdin, answers: TextIO = sys.stdout) -> None:
    """Load the artifact of ``request``, and answer commands until there are no more."""
    _end_with_parent()
    task = json.loads(request)
    _answer(answers, {"ready": True})
    if not commands.readline():
        return
    start = time.perf_counter()
    runner = load(task["artifact"], threads=task["threads"])
    load_s = time.perf_counter() - start
    workload = parse_workload(task["workload"])
    check_fits(runner, workload)
    worker = Worker(runner, workload)
    _answer(answers, {"load_s": load_s, "threads": runner.session.threads})
    for line in commands:
        command = json.loads(line)
        if command["do"] == "peak":
            _answer(answers, {"peak_rss_bytes": peak_rss_bytes()})
        else:
            samples = worker.block(command["metric"], command["count"], command["seed"])
            _answer(answers, {"samples": samples})


def _end_with_parent() -> None:
    """Leave Ctrl-C to the parent, and die with it: a stopped process would live for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):  # Linux only
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
