"""llmopt bench: its table and its file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_artifacts import rewrite_manifest

from llmopt.benchmark.ceilings import Ceilings
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
        ("--workload prefill=900,decode=9", "takes at most 48 tokens"),
        ("--repetitions 0", "repetitions must be at least 1"),
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


def test_a_page_and_a_profile_are_written(llmopt: Any, made: Path, tmp_path: Path) -> None:
    files = ["--html", tmp_path / "a.html", "-o", tmp_path / "a.json"]
    result = llmopt("bench", made / "shared", *QUICK, *files, "--profile")

    assert result.exit_code == 0, result.stderr
    assert "prefill: " in result.stdout
    assert "(no module)" in result.stdout
    data = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert [phase["phase"] for phase in data["artifacts"][0]["profile"]] == ["prefill", "decode"]
    assert "Where the time goes" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_limits_are_shown_where_the_manifest_says_what_there_is_to_do(
    llmopt: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(made / "shared", tmp_path / "counted")
    counted = {"macs": {"float32": 5000}, "weight_bytes": 20000}
    work = {"products": {"token": counted}, "attention_macs": 64, "cache_bytes": 256}
    rewrite_manifest(folder, work=work | {"lookup_bytes": 48, "other_bytes": 0})
    monkeypatch.setattr(
        "llmopt.benchmark.explaining.measure_ceilings",
        lambda threads, _: Ceilings(threads, 1e10, {"float32": 1e11}, {"float32": "numpy"}),
    )
    result = llmopt("bench", folder, *QUICK)

    assert "of the limit" in result.stdout
    assert [line.split()[1] for line in result.stdout.splitlines()[-2:]] == ["prefill", "decode"]


def test_a_place_that_cannot_be_written_is_told_before_measuring(
    llmopt: Any, made: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for flag in ("--output", "--html"):
        result = llmopt("bench", made / "shared", *QUICK, flag, tmp_path / "file" / "out")
        assert result.exit_code == 1
        assert "cannot be written" in result.stderr
        assert "repetition" not in result.stderr
    both = ["--output", tmp_path / "x", "--html", tmp_path / "x"]
    assert llmopt("bench", made / "shared", *QUICK, *both).exit_code == 2


def test_a_file_of_inputs_is_a_workload(llmopt: Any, made: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "in.npz"
    np.savez(inputs, input_ids=np.ones((2, 3), np.int64))
    line = ["bench", made / "encoder", "--workload", inputs, "--repetitions", 2, "--threads", 1]
    result = llmopt(*line)

    assert result.exit_code == 0, result.stderr
    assert "per run ms" in result.stdout
    assert llmopt(*line, "--batch", 2).exit_code == 2
    np.savez(inputs, wrong=np.ones(1))
    refused = llmopt(*line)
    assert (refused.exit_code, "no input 'wrong'" in refused.stderr) == (2, True)
    inputs.unlink()
    assert llmopt(*line).exit_code == 2


def test_a_batch_replaces_the_workload_s(llmopt: Any, made: Path) -> None:
    result = llmopt("bench", made / "encoder", "--batch", 3, "--repetitions", 1, "--threads", 1)
    assert result.stdout.startswith("encode=3x16")


def test_a_silent_engine_and_a_restless_machine_are_told_of(
    llmopt: Any, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmopt.runtime.engines.onnxruntime.OnnxRuntimeSession.profiles", False)
    monkeypatch.setattr("llmopt.benchmark.measuring.warmups_in", lambda _: None)
    result = llmopt("bench", made / "shared", *QUICK[:2], "--repetitions", 6, "--profile")

    assert "no profile" in result.stderr
    assert "still show a trend" in result.stderr
