"""Measuring tiny artifacts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmopt.benchmark import Encode, Generate, MeasurePlan, measure, probe
from llmopt.errors import ArtifactError, LlmoptError, UsageError
from llmopt.runtime import Runner, load

PROBED = ["load_s", "peak_rss_bytes"]


def test_a_decoder_is_measured_from_loading_to_the_last_token(artifacts: Path) -> None:
    told: list[str] = []
    plan = MeasurePlan(Generate(8, 4), threads=1, repetitions=3, warmups=1, processes=1)
    result = measure([artifacts / "shared"], plan, told.append)
    (artifact,) = result.artifacts
    assert [(m.name, len(m.samples)) for m in artifact.metrics] == [
        ("load_s", 1),
        ("peak_rss_bytes", 1),
        ("ttft_s", 3),
        ("prefill_tokens_per_s", 3),
        ("time_per_output_token_s", 3),
        ("decode_tokens_per_s", 3),
        ("token_latency_s", 9),
    ]
    assert all(sample > 0 for m in artifact.metrics for sample in m.samples)
    peak = artifact.metric("peak_rss_bytes")
    assert peak is not None
    assert 2e7 < peak.median < 1e9
    assert artifact.size_bytes > 1000
    assert (result.threads, result.warmups, result.workload) == (1, 1, "prefill=8,decode=4")
    assert told[0].startswith("loading ")
    assert told[1:] == ["warm-up", *(f"repetition {n} of 3" for n in (1, 2, 3))]


def test_rates_follow_from_times(artifacts: Path) -> None:
    plan = MeasurePlan(Generate(8, 4, batch=2), threads=1, repetitions=1, warmups=0, processes=0)
    (artifact,) = measure([artifacts / "concat"], plan).artifacts
    found = {metric.name: metric.samples[0] for metric in artifact.metrics}
    assert found["prefill_tokens_per_s"] == pytest.approx(16 / found["ttft_s"])
    assert found["decode_tokens_per_s"] == pytest.approx(2 / found["time_per_output_token_s"])


def test_one_new_token_has_no_decode_rate(artifacts: Path) -> None:
    plan = MeasurePlan(Generate(8, 1), threads=1, repetitions=1, warmups=0, processes=0)
    (artifact,) = measure([artifacts / "shared"], plan).artifacts
    assert [m.name for m in artifact.metrics] == ["ttft_s", "prefill_tokens_per_s"]


def test_an_encoder_is_measured(artifacts: Path) -> None:
    plan = MeasurePlan(Encode(2, 8), threads=1, repetitions=2, warmups=0, processes=0)
    (artifact,) = measure([artifacts / "encoder"], plan).artifacts
    names = [(m.name, len(m.samples)) for m in artifact.metrics]
    assert names == [("encode_latency_s", 2), ("encode_tokens_per_s", 2)]


def test_artifacts_take_turns_with_the_same_fresh_tokens(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []

    def run_once(runner: Runner, _: object, random: np.random.Generator) -> dict[str, list[float]]:
        seen.append((runner.folder.name, int(random.integers(10**9))))
        return {"ttft_s": [1.0]}

    monkeypatch.setattr("llmopt.benchmark.measuring.run_once", run_once)
    plan = MeasurePlan(Generate(2, 2), threads=1, repetitions=3, warmups=0, processes=0)
    measure([artifacts / "shared", artifacts / "concat"], plan)
    names = [name for name, _ in seen]
    assert sorted(names[:2]) == sorted(names[2:4]) == ["concat", "shared"]
    assert names[:2] == names[3:1:-1] == names[4:]
    tokens = [token for _, token in seen]
    assert tokens[::2] == tokens[1::2]
    assert len(set(tokens)) == 3


def test_what_does_not_fit_is_refused_before_measuring(artifacts: Path) -> None:
    for name, workload in (("encoder", Generate(2, 2)), ("shared", Encode(2, 2))):
        with pytest.raises(UsageError, match=rf"cannot run {workload}"):
            measure([artifacts / name], MeasurePlan(workload, threads=1))
    with pytest.raises(UsageError, match="takes at most 48 tokens; prefill=40,decode=9 needs 49"):
        measure([artifacts / "shared"], MeasurePlan(Generate(40, 9), threads=1))
    with pytest.raises(UsageError, match="no artifact"):
        measure([], MeasurePlan(Generate(2, 2)))
    with pytest.raises(UsageError, match="repetitions"):
        MeasurePlan(Generate(2, 2), repetitions=0)
    with pytest.raises(ArtifactError, match="not found"):
        measure([artifacts / "nothing"], MeasurePlan(Generate(2, 2)))


def test_the_probe_prints_one_object(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = {"artifact": str(artifacts / "shared"), "workload": "prefill=2,decode=2"}
    probe.main(json.dumps(request | {"threads": 1}))
    assert list(json.loads(capsys.readouterr().out)) == PROBED


def test_a_probe_that_fails_says_why(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmopt.benchmark.measuring._PROBE", "llmopt.benchmark.nothing")
    plan = MeasurePlan(Generate(2, 2), threads=1, processes=1)
    with pytest.raises(LlmoptError, match=r"a fresh process could not run .*nothing"):
        measure([artifacts / "shared"], plan)


def test_memory_is_unknown_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert probe.peak_rss_bytes(tmp_path / "status") is None
    (tmp_path / "status").write_text("Name:\tx\n")
    assert probe.peak_rss_bytes(tmp_path / "status") is None
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t    2048 kB\n")
    assert probe.peak_rss_bytes(tmp_path / "status") == 2 * 2**20


def test_measured_artifacts_stay_usable(artifacts: Path) -> None:
    assert load(artifacts / "shared", threads=1).generate("a", max_new_tokens=2)
