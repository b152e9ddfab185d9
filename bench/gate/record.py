"""Record sessions of the gate next to a noisy neighbour: ``record.py ARTIFACT``.

Each session measures an artifact against itself, the candidate slowed by 0, 2, 5 or 10 % in
rotation, for the time budget of a check, or until errors are so small that any check would have
been decided. A session is one file; existing ones are kept, so recording can be interrupted and
resumed. ``decide.py`` replays them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))
from gate.neighbour import noisy_neighbour

from llmopt.artifact.manifest import Manifest
from llmopt.benchmark.gate.decisions import PROCESSES, Question, ask
from llmopt.benchmark.gate.pairs import GATED, gate_threads, gate_workload
from llmopt.benchmark.gate.process import WORKER, Task
from llmopt.benchmark.gate.rounds import (
    BASELINE,
    CANDIDATE,
    MEMORY,
    Measured,
    Rounds,
    metrics_of,
)
from llmopt.benchmark.machine import this_machine

HERE: Final = Path(__file__).parent
SESSIONS: Final = HERE / "sessions"
SPINS: Final = (0.0, 0.02, 0.0, 0.05, 0.0, 0.10)
_ENOUGH: Final = 0.003
"""The standard error at which any check is conclusive."""


def command(spin: float) -> list[str]:
    """Return the command of a worker that is slower by ``spin``."""
    return list(WORKER) if not spin else [sys.executable, str(HERE / "slow_worker.py"), str(spin)]


def record(artifact: Path, number: int, seconds: float, cores: int) -> dict[str, Any]:
    """Return a session: as many rounds as fit in the time, with a noisy neighbour on some cores."""
    spin, workload = SPINS[number % len(SPINS)], str(gate_workload(Manifest.read(artifact)))
    tasks = {
        BASELINE: Task(artifact, workload, gate_threads()),
        CANDIDATE: Task(artifact, workload, gate_threads(), command(spin)),
    }
    rounds = Rounds(tasks, seed=number)
    with noisy_neighbour(number, cores) as log:
        while (
            not rounds.durations_s or sum(rounds.durations_s) + max(rounds.durations_s) <= seconds
        ):
            rounds.measure()
            if 2 * rounds.count > PROCESSES and largest_error(rounds.measured) <= _ENOUGH:
                break
    return {
        "schema": 1,
        "artifact": artifact.name,
        "workload": workload,
        "spin": spin,
        "seconds": seconds,
        "rounds_s": rounds.durations_s,
        "neighbour": list(log),
        "machine": vars(this_machine()),
        "measured": [_rounded(each.to_dict()) for each in rounds.measured],
    }


def largest_error(measured: Sequence[Measured]) -> float:
    """Return the largest error of the comparisons of latencies."""
    metrics = [metric for metric in metrics_of(measured) if metric in GATED and metric != MEMORY]
    return max(ask(Question("recorded", metric), measured).ratio.error for metric in metrics)


def main() -> None:
    """Record the sessions that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--sessions", type=int, default=60, help="total number of sessions")
    parser.add_argument("--most", type=int, default=10_000, help="number of sessions to record now")
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit of a session")
    parser.add_argument("--cores", type=int, default=1, help="cores that the neighbour may load")
    parser.add_argument("--quiet", action="store_true", help="record without the neighbour")
    parser.add_argument("--folder", type=Path, default=SESSIONS)
    options = parser.parse_args()
    cores = 0 if options.quiet else options.cores
    options.folder.mkdir(parents=True, exist_ok=True)
    paths = [options.folder / f"{number:03}.json.gz" for number in range(options.sessions)]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    for number in missing[: options.most]:
        session = record(options.artifact, number, options.seconds, cores)
        partial = paths[number].with_suffix(".partial")
        with gzip.GzipFile(partial, "wb", mtime=0) as file:
            file.write(json.dumps(session).encode())
        partial.rename(paths[number])
        took = sum(session["rounds_s"])
        print(f"{paths[number].name}: {session['spin']:.0%}, {took:.0f} s", flush=True)


def _rounded(measured: dict[str, Any]) -> dict[str, Any]:
    """Return measurements rounded to 10 ns: the rest is noise, and half of the file."""
    blocks = {
        metric: [[round(sample, 8) for sample in block] for block in samples]
        for metric, samples in measured["blocks"].items()
    }
    return measured | {"blocks": blocks}


if __name__ == "__main__":
    main()
