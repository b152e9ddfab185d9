"""How many cores this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may keep busy: its affinity, within its cgroup's quota.

    Args:
        root: Directory that holds ``proc`` and ``sys``.
    """
    allowed = len(os.sched_getaffinity(0))
    # A quota of 1.5 cores with two threads is throttled for a quarter of the time.
    return max(1, min([allowed, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Yield every processor quota, in cores, on the way from the process's cgroup to the top."""
    for controllers, path in _memberships(root):
        if controllers == "":  # version 2
            for folder in _upwards(root / "sys/fs/cgroup", path):
                yield from _quota(_numbers(folder / "cpu.max"))
        elif "cpu" in controllers.split(","):
            for folder in _upwards(root / "sys/fs/cgroup/cpu", path):
                quota = _numbers(folder / "cpu.cfs_quota_us")
                yield from _quota(quota + _numbers(folder / "cpu.cfs_period_us"))


def _memberships(root: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        yield controllers, path


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    folder = mount / path.lstrip("/")
    yield folder
    while folder != mount:
        folder = folder.parent
        yield folder


def _quota(numbers: list[int]) -> Iterator[float]:
    if len(numbers) == 2 and min(numbers) > 0:  # -1 and "max" mean no limit
        yield numbers[0] / numbers[1]


def _numbers(file: Path) -> list[int]:
    try:
        return [int(word) for word in file.read_text().split() if word != "max"]
    except (OSError, ValueError):
        return []
