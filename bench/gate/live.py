"""Let the gate decide live, beside a noisy neighbour: ``live.py ARTIFACT``; resumable.

Runs take turns over the goals of ``decide.py``; each adds a line to a file, and is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from gate.decide import GOALS, Goal
from gate.neighbour import noisy_neighbour
from gate.record import HERE, command

from llmopt.benchmark.gate import CheckRequest, check


def run(artifact: Path, goal: Goal, seed: int, cores: int) -> dict[str, Any]:
    """Return what one check came to."""
    request = CheckRequest(
        candidates=(artifact,),
        baseline=artifact,
        allowances={"": goal.allowance},
        seed=seed,
        commands={"candidate": command(goal.spin)},
    )
    start = time.perf_counter()
    with noisy_neighbour(10_000 + seed, cores):
        result = check(request)
    verdict = "open" if result.verdict == "inconclusive" else result.verdict
    return {
        "goal": goal.name,
        "verdict": verdict,
        "right": verdict in goal.right,
        "time_s": round(time.perf_counter() - start, 1),
        "changes": {a.question.metric: round(a.change, 4) for a in result.answers},
    }


def main() -> None:
    """Make the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--runs", type=int, default=30, help="how many there are to be")
    parser.add_argument("--most", type=int, default=10_000, help="how many to make now")
    parser.add_argument("--cores", type=int, default=1, help="the most the neighbour works on")
    parser.add_argument("--file", type=Path, default=HERE / "live.jsonl")
    options = parser.parse_args()
    done = options.file.read_text().splitlines() if options.file.exists() else []
    for number in range(len(done), min(options.runs, len(done) + options.most)):
        found = run(options.artifact, GOALS[number % len(GOALS)], number, options.cores)
        with options.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{found['goal']}: {found['verdict']} in {found['time_s']} s", flush=True)


if __name__ == "__main__":
    main()
