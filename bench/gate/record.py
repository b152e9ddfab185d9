"""Record sessions of the gate's measuring beside a noisy neighbour: ``record.py ARTIFACT``.

Each session measures an artifact against itself, the candidate not slowed or by 2, 5 or 10 % by
turns, for as long as a check may take, or until errors are so small that any check would have
known before. A session is one file; those that are there are not recorded again, so it may be
stopped and started at will. ``decide.py`` replays them.
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
"""The error of a comparison that any check is sure with."""


def command(spin: float) -> list[str]:
    """Return what starts a worker that is slower by ``spin``."""
    return list(WORKER) if not spin else [sys.executable, str(HERE / "slow_worker.py"), str(spin)]


def record(artifact: Path, number: int, seconds: float, cores: int) -> dict[str, Any]:
    """Return a session: as many rounds as there is time for, beside a neighbour on some cores."""
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


def largest_error(found: Sequence[Measured]) -> float:
    """Return the largest error of the comparisons of latencies."""
    metrics = [metric for metric in metrics_of(found) if metric in GATED and metric != MEMORY]
    return max(ask(Question("recorded", metric), found).ratio.error for metric in metrics)


def main() -> None:
    """Record the sessions that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--sessions", type=int, default=60, help="how many there are to be")
    parser.add_argument("--most", type=int, default=10_000, help="how many to record now")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each, at most")
    parser.add_argument("--cores", type=int, default=1, help="the most the neighbour works on")
    parser.add_argument("--quiet", action="store_true", help="without the neighbour")
    parser.add_argument("--folder", type=Path, default=SESSIONS)
    options = parser.parse_args()
    cores = 0 if options.quiet else options.cores
    options.folder.mkdir(parents=True, exist_ok=True)
    places = [options.folder / f"{number:03}.json.gz" for number in range(options.sessions)]
    missing = [number for number, place in enumerate(places) if not place.exists()]
    for number in missing[: options.most]:
        session = record(options.artifact, number, options.seconds, cores)
        partial = places[number].with_suffix(".partial")
        with gzip.GzipFile(partial, "wb", mtime=0) as file:
            file.write(json.dumps(session).encode())
        partial.rename(places[number])
        took = sum(session["rounds_s"])
        print(f"{places[number].name}: {session['spin']:.0%}, {took:.0f} s", flush=True)


def _rounded(measured: dict[str, Any]) -> dict[str, Any]:
    """Keep a hundredth of a microsecond: the rest is noise, and takes half of the file."""
    blocks = {
        metric: [[round(sample, 8) for sample in block] for block in found]
        for metric, found in measured["blocks"].items()
    }
    return measured | {"blocks": blocks}


if __name__ == "__main__":
    main()
