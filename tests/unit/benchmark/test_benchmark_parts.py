"""Workloads, statistics, the machine, and the form of results."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.benchmark.machine import MachineFingerprint, this_machine
from llmopt.benchmark.results import ArtifactResult, BenchmarkResult, Metric
from llmopt.benchmark.statistics import median, median_interval, percentile
from llmopt.benchmark.workload import Encode, Generate, default_workload, parse_workload
from llmopt.errors import UsageError

MACHINE = MachineFingerprint("a chip", "x86_64", 2, ("avx2",), 10**9, "Linux 6", {"python": "3.11"})


@pytest.mark.parametrize(
    "workload", [Generate(128, 64), Generate(1, 1, 3), Encode(8, 128), Encode(1, 1)]
)
def test_a_workload_is_its_text(workload: Generate | Encode) -> None:
    assert parse_workload(str(workload)) == workload
    assert parse_workload(str(workload).upper().replace(",", " , ")) == workload


def test_a_batch_given_apart_wins() -> None:
    assert parse_workload("prefill=1,decode=2,batch=3", 4) == Generate(1, 2, 4)
    assert parse_workload("encode=8x128", 2) == Encode(2, 128)


@pytest.mark.parametrize(
    "text", ["", "prefill=1", "decode=1,prefill=1", "encode=8", "encode=8x-1", "prefill=a,decode=1"]
)
def test_texts_that_are_no_workload_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="unknown workload"):
        parse_workload(text)


@pytest.mark.parametrize("text", ["prefill=0,decode=1", "prefill=1,decode=0", "encode=0x1"])
def test_a_workload_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        parse_workload(text)
    with pytest.raises(UsageError, match="batch must be at least 1"):
        parse_workload("encode=1x1", 0)


def test_the_default_fits_the_model() -> None:
    assert default_workload("generate", 0) == Generate(128, 64)
    assert default_workload("generate", 48, 2) == Generate(32, 16, 2)
    assert default_workload("encode", 512) == Encode(8, 128)


SAMPLES = st.lists(st.floats(0, 100), min_size=1, max_size=50)


@given(SAMPLES)
def test_the_median_is_numpy_s(samples: list[float]) -> None:
    assert median(samples) == pytest.approx(float(np.median(samples)))


@given(SAMPLES)
def test_the_interval_holds_the_median(samples: list[float]) -> None:
    interval = median_interval(samples)
    assert (interval is None) == (len(samples) < 6)
    if interval is not None:
        assert interval[0] <= median(samples) <= interval[1]


@pytest.mark.parametrize("count", [6, 10, 25])
def test_the_interval_covers_as_often_as_it_says(count: int) -> None:
    random = np.random.default_rng(count)
    hits = 0
    for _ in range(2000):
        interval = median_interval(list(random.exponential(1.0, count)))
        assert interval is not None
        hits += interval[0] <= math.log(2) <= interval[1]
    assert 0.94 < hits / 2000 < 0.995


def test_no_percentile_comes_from_too_few_samples() -> None:
    assert percentile([1.0] * 63, 90) is None
    assert percentile([1.0] * 661, 99) is None
    assert percentile(range(1, 663), 99) == 656
    assert percentile([5.0], 50) == 5
    with pytest.raises(UsageError, match="percentile 95"):
        percentile([1.0], 95)


def test_this_machine_is_described() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory_bytes is not None
    assert machine.memory_bytes > 10**8
    assert machine.processor
    assert "onnxruntime" in machine.versions


def test_features_are_read_from_either_spelling(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model name\t: Chip\nflags\t: fpu avx2 fma\n\nflags: sve\n")
    assert this_machine(tmp_path).features == ("avx2", "fma")
    assert this_machine(tmp_path).processor == "Chip"
    (tmp_path / "cpuinfo").write_text("Features\t: fp asimd i8mm\n")
    assert this_machine(tmp_path).features == ("asimd", "i8mm")
    assert this_machine(tmp_path / "none").features == ()


def test_a_system_that_does_not_tell_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> int:
        raise ValueError("unknown name")

    monkeypatch.setattr(os, "sysconf", refuse)
    assert this_machine().memory_bytes is None


def test_the_fingerprint_tells_machines_apart() -> None:
    same = dataclasses.replace(MACHINE)
    other = dataclasses.replace(MACHINE, versions={"python": "3.12"})
    assert MACHINE.fingerprint == same.fingerprint != other.fingerprint


def test_results_keep_raw_samples_and_leave_gaps_open() -> None:
    metric = Metric("ttft_s", (3.0, 1.0, 2.0))
    many = Metric("decode_tokens_per_s", tuple(map(float, range(100))))
    artifact = ArtifactResult("a", "onnxruntime-cpu", 12, (metric, many))
    result = BenchmarkResult("encode=1x1", 1, MACHINE, (artifact,), 2)
    data = json.loads(result.to_json())
    assert data["schema"] == 1
    assert data["machine"]["fingerprint"] == MACHINE.fingerprint
    found = data["artifacts"][0]["metrics"]
    assert found["ttft_s"] == {
        "median": 2.0,
        "interval_95": None,
        "p90": None,
        "p99": None,
        "outliers": [],
        "samples": [3.0, 1.0, 2.0],
    }
    assert found["decode_tokens_per_s"]["interval_95"] == [39.0, 60.0]  # ranks 40 and 61
    assert found["decode_tokens_per_s"]["p90"] == 89.0
    assert [(row.metric, row.median, row.count) for row in result.rows()] == [
        ("ttft_s", 2.0, 3),
        ("decode_tokens_per_s", 49.5, 100),
    ]
    assert artifact.metric("ttft_s") is metric
    assert artifact.metric("none") is None
