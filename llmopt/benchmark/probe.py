"""A fresh process that loads an artifact and runs a workload once: ``python -m`` this module.

Prints the time to load and the peak of resident memory as one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from llmopt.benchmark.measuring import run_once
from llmopt.benchmark.workload import parse_workload
from llmopt.runtime import load


def main(request: str) -> None:
    """Do what ``request``, a JSON object, asks for."""
    asked = json.loads(request)
    start = time.perf_counter()
    runner = load(asked["artifact"], threads=asked["threads"])
    found: dict[str, float] = {"load_s": time.perf_counter() - start}
    run_once(runner, parse_workload(asked["workload"]), np.random.default_rng(0))
    if (peak := peak_rss_bytes()) is not None:
        found["peak_rss_bytes"] = peak
    sys.stdout.write(json.dumps(found) + "\n")


def peak_rss_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """Return the most memory this process had resident at once; None where nothing says so."""
    # getrusage would also count what the parent had before it became this process.
    try:
        lines = status.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    peaks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(peaks[0]) * 1024 if peaks else None


if __name__ == "__main__":
    main(sys.argv[1])
