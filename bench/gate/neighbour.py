"""A noisy neighbour that comes and goes at random: what a shared runner is like."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Final

_NOISE: Final = """
import random, time
import numpy as np
a, b = np.random.rand(300, 300).astype("f"), np.random.rand(1 << 22)
while True:
    for _ in range(random.randrange(1, 60)):
        a @ a
    for _ in range(random.randrange(1, 20)):
        b.sum()
    time.sleep(random.random() * 0.05)
"""
"""Products of matrices and sums of 32 MB, with pauses: it takes cores, caches and bandwidth."""
_MEAN_S: Final = 5.0


@contextlib.contextmanager
def noisy_neighbour(seed: int, cores: int = 1) -> Iterator[list[tuple[float, int]]]:
    """Run a noisy neighbour half of the time, for some 5 s each time.

    Yields its log: times, and the number of loaded cores from then on.

    Args:
        seed: Seed of the schedule.
        cores: Largest number of loaded cores: with 2, two every third time.
    """
    log: list[tuple[float, int]] = []
    stop = threading.Event()
    thread = threading.Thread(target=_come_and_go, args=(random.Random(seed), cores, stop, log))  # noqa: S311 - noise
    thread.start()
    try:
        yield log
    finally:
        stop.set()
        thread.join()


def _come_and_go(
    rng: random.Random, most: int, stop: threading.Event, log: list[tuple[float, int]]
) -> None:
    start = time.perf_counter()
    while not stop.is_set():
        cores = min(rng.choice((1, 1, 2)), most) if rng.random() < 0.5 else 0
        log.append((round(time.perf_counter() - start, 2), cores))
        process = None
        if cores:
            environment = os.environ | {"OPENBLAS_NUM_THREADS": str(cores)}
            process = subprocess.Popen([sys.executable, "-c", _NOISE], env=environment)
        stop.wait(rng.expovariate(1 / _MEAN_S))
        if process is not None:
            process.kill()
            process.wait()
