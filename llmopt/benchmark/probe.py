"""A fresh process that loads an artifact and runs a workload once: ``python -m`` this module.

It prints its load time and peak resident memory as one JSON object.
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
    """Load and run the artifact of ``request``, a JSON object, and print the metrics."""
    task = json.loads(request)
    start = time.perf_counter()
    runner = load(task["artifact"], threads=task["threads"])
    metrics: dict[str, float] = {"load_s": time.perf_counter() - start}
    run_once(runner, parse_workload(task["workload"]), np.random.default_rng(0))
    if (peak := peak_rss_bytes()) is not None:
        metrics["peak_rss_bytes"] = peak
    sys.stdout.write(json.dumps(metrics) + "\n")


def peak_rss_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """Return the peak resident memory of this process; None if the system does not report it."""
    # getrusage would also count the parent's memory before exec.
    try:
        lines = status.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    peaks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(peaks[0]) * 1024 if peaks else None


if __name__ == "__main__":
    main(sys.argv[1])
