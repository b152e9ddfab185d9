"""llmopt bench: its table and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmopt.benchmark.results import Metric
from llmopt.cli.bench import _measured

QUICK = ["--workload", "prefill=5,decode=3", "--repetitions", 2, "--threads", 1]


@pytest.fixture(autouse=True)
def few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probe nothing in fresh processes: the benchmark's own tests do."""
    monkeypatch.setattr(
        "llmopt.benchmark.measuring._probe_all",
        lambda *_: {"load_s": [0.25, 0.25], "peak_rss_bytes": [2e8, 2e8]},
    )


def test_the_table_has_a_line_for_each_artifact(llmopt: Any, made: Path) -> None:
    result = llmopt("bench", made / "shared", made / "concat", *QUICK)

    assert result.exit_code == 0, result.stderr
    title, header, *lines = result.stdout.splitlines()
    assert title.startswith("prefill=5,decode=3, 1 thread")
    assert "decode tok/s" in header
    assert "first token ms" in header
    assert [line.split()[0] for line in lines] == [str(made / "shared"), str(made / "concat")]
    assert all(line.endswith("200") for line in lines)
    assert "repetition 2 of 2" in result.stderr


def test_json_has_raw_samples_and_goes_to_a_file_too(
    llmopt: Any, made: Path, tmp_path: Path
) -> None:
    line = ["bench", made / "shared", *QUICK, "--json", "--output", tmp_path / "out.json"]
    result = llmopt(*line)

    data = json.loads(result.stdout)
    assert data == json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert len(data["artifacts"][0]["metrics"]["ttft_s"]["samples"]) == 2
    assert llmopt(*line).exit_code == 2
    assert llmopt(*line, "--force").exit_code == 0


def test_the_workload_follows_the_task(llmopt: Any, made: Path) -> None:
    result = llmopt("bench", made / "encoder", "--repetitions", 1, "--threads", 1)

    assert result.stdout.startswith("encode=8x16")
    assert "encode tok/s" in result.stdout


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--workload fast", "prefill=128,decode=64"),
        ("--workload encode=2x2", "encode=… for embed"),
        ("--workload prefill=900,decode=9", "takes 48 tokens"),
        ("--repetitions 0", "1 or more"),
    ],
)
def test_a_workload_that_does_not_fit_is_refused(
    flags: str, says: str, llmopt: Any, made: Path
) -> None:
    result = llmopt("bench", made / "shared", *flags.split())

    assert result.exit_code == 2
    assert says in result.stderr


def test_few_samples_have_no_interval() -> None:
    assert _measured(Metric("ttft_s", (0.1, 0.2, 0.3)), 1e3) == "200"
    assert "±" in _measured(Metric("ttft_s", tuple(0.1 + i / 1000 for i in range(9))), 1e3)
