"""The parent's end of a worker: a process that is stopped while it is idle.

The threads of a pool spin for a while after their last task. Those of one worker would take a core
from the next, so each process is stopped (SIGSTOP) between its blocks.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Self

from llmopt.errors import LlmoptError

WORKER: Final = (sys.executable, "-m", "llmopt.benchmark.gate.worker")
_TIMEOUT_S: Final = 900.0
"""Time for a worker to answer: loading a large model from a slow disk takes minutes."""


@dataclass(frozen=True)
class Task:
    """The task of a worker.

    Args:
        artifact: Directory of the artifact.
        workload: Workload as text.
        threads: Threads inside one operator; None for all usable cores.
        command: Command that starts the worker; the request is appended.
    """

    artifact: Path
    workload: str
    threads: int | None = None
    command: Sequence[str] = WORKER


class WorkerProcess:
    """A fresh process that is starting: call `ready`, then `begin_to_load`.

    Args:
        task: Task of the worker.
    """

    load_s: float
    threads: int

    def __init__(self, task: Task) -> None:
        self._task = task
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        request = {
            "artifact": str(task.artifact),
            "workload": task.workload,
            "threads": task.threads,
        }
        self._process = subprocess.Popen(  # noqa: S603 - ours
            [*task.command, json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    def __enter__(self) -> Self:
        """Return the process."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.end()

    def ready(self) -> None:
        """Wait until the worker has done its imports, and stop it."""
        self._answer()
        self._stop()

    def begin_to_load(self) -> None:
        """Tell the worker to load its artifact."""
        self._send({"do": "load"})

    def loaded(self) -> None:
        """Wait until the worker has loaded, stop it, and record its load time.

        Raises:
            LlmoptError: The artifact cannot be loaded, or cannot run the workload.
        """
        answer = self._answer()
        self._stop()
        self.load_s, self.threads = answer["load_s"], answer["threads"]

    def block(self, metric: str, count: int, seed: int) -> list[float]:
        """Return the seconds of ``count`` repetitions; see `worker.Worker.block`."""
        command = {"do": "block", "metric": metric, "count": count, "seed": seed}
        samples: list[float] = self._ask(command)["samples"]
        return samples

    def peak_rss_bytes(self) -> int | None:
        """Return the peak resident memory; None if the system does not report it."""
        peak: int | None = self._ask({"do": "peak"})["peak_rss_bytes"]
        return peak

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        self._send(command)
        answer = self._answer()
        self._stop()
        return answer

    def _send(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        self._signal(signal.SIGCONT)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(_TIMEOUT_S):
                raise LlmoptError(f"{self._name} did not answer within {_TIMEOUT_S:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # the next answer reports the end
            os.kill(self._process.pid, number)

    @property
    def _name(self) -> str:
        return f"{self._task.artifact}: the process measuring {self._task.workload}"

    def _ended(self) -> LlmoptError:
        self._process.kill()
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        if code < 0 and not lines:
            why = f"killed by {_signal_name(-code)}"
        else:
            why = lines[-1] if lines else f"exit code {code}"
        return LlmoptError(f"{self._name} ended: {why}")


@contextlib.contextmanager
def started(tasks: Sequence[Task], order: Sequence[int]) -> Iterator[list[WorkerProcess]]:
    """Yield a fresh worker for each task.

    All start at the same time, and then load in ``order``, one of each side at a time.
    """
    with contextlib.ExitStack() as stack:
        workers = {index: stack.enter_context(WorkerProcess(tasks[index])) for index in order}
        for worker in workers.values():
            worker.ready()
        ordered = list(workers.values())
        for pair in (ordered[:2], ordered[2:]):
            for worker in pair:
                worker.begin_to_load()
            for worker in pair:
                worker.loaded()
        yield [workers[index] for index in range(len(tasks))]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
