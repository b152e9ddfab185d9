"""How many cores a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmopt.runtime.cores import usable_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_affinity_counts_where_there_is_no_cgroup(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == 8


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("nonsense", 8)],
)
def test_version_two_quota(tmp_path: Path, limit: str, cores: int) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path / "sys/fs/cgroup/a/cpu.max", limit)
    assert usable_cores(tmp_path) == cores


def test_the_tightest_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path / "sys/fs/cgroup/a/b/cpu.max", "600000 100000")
    write(tmp_path / "sys/fs/cgroup/a/cpu.max", "300000 100000")
    assert usable_cores(tmp_path) == 3


@pytest.mark.parametrize(("quota", "cores"), [(-1, 8), (400000, 4)])
def test_version_one_quota(tmp_path: Path, quota: int, cores: int) -> None:
    write(tmp_path / "proc/self/cgroup", "4:memory:/m\n1:cpu,cpuacct:/job\n")
    write(tmp_path / "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", f"{quota}\n")
    write(tmp_path / "sys/fs/cgroup/cpu/job/cpu.cfs_period_us", "100000\n")
    assert usable_cores(tmp_path) == cores
