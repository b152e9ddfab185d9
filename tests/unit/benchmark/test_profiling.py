"""Time by module: read from an engine's profile, added up, and from real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmopt.benchmark import Encode, Generate
from llmopt.benchmark.profiling import phase_of, profile
from llmopt.errors import LlmoptError
from llmopt.runtime.engines.onnxruntime_profile import read_profile
from llmopt.runtime.engines.tvm_profile import Stopwatch
from llmopt.runtime.session import TimedOperator, TimedRun


def kernel(name: str, ts: int, dur: int) -> dict[str, Any]:
    args = {"op_name": name.rpartition("/")[2]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": args}


def test_operators_belong_to_the_run_that_they_lie_in(tmp_path: Path) -> None:
    events = [
        {"cat": "Session", "name": "model_loading_uri", "ts": 0, "dur": 5},
        kernel("layers.0.attention/MatMul", 110, 30),
        kernel("MatMul", 150, 40),
        {"cat": "Session", "name": "model_run", "ts": 100, "dur": 100},
        {"cat": "Session", "name": "model_run", "ts": 300, "dur": 50},
        kernel("lm_head/MatMul", 310, 20),
    ]
    (tmp_path / "p.json").write_text(json.dumps(events))
    first, second = read_profile(tmp_path / "p.json")

    assert first.seconds == pytest.approx(100e-6)
    assert [o.module for o in first.operators] == ["layers.0.attention", ""]
    assert first.operators[1].kernel_s == pytest.approx(40e-6)
    assert first.operators[1].seconds == pytest.approx(50e-6)  # since the one before ended
    assert [o.module for o in second.operators] == ["lm_head"]
    assert second.operators[0].seconds == pytest.approx(20e-6)


@pytest.mark.parametrize("text", ["{", "[1]", '[{"name": "model_run"}]'])
def test_a_damaged_profile_is_an_error_with_its_path(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(LlmoptError, match=r"p\.json cannot be read"):
        read_profile(tmp_path / "p.json")


def test_time_is_added_up_by_part_and_by_layer() -> None:
    names = ("layers.0.mlp.up", "layers.0.mlp.down", "layers.1.mlp.up", "head", "")
    run = TimedRun(10.0, tuple(TimedOperator(name, "MatMul", 1.0, 1.5) for name in names))
    found = phase_of("decode", [run, run]).to_dict()

    assert found["by_part"] == {"layers.*.mlp": 4.5, "head": 1.5, "": 1.5}
    assert found["by_layer"] == [
        {"layer": 0, "parts": {"layers.*.mlp": 3.0}},
        {"layer": 1, "parts": {"layers.*.mlp": 1.5}},
    ]
    assert found["attributed"] == pytest.approx(0.6)
    assert (found["kernel_s"], found["outside_s"]) == (5.0, 2.5)
    assert {each["calls"] for each in found["operators"]} == {1}


def test_a_decoder_on_onnxruntime_is_profiled_by_phase(artifacts: Path) -> None:
    prefill, decode = profile(artifacts / "shared", Generate(8, 4), threads=1)

    assert (prefill.phase, decode.phase) == ("prefill", "decode")
    assert (prefill.runs, decode.runs) == (3, 9)
    for phase in (prefill, decode):
        inside = sum(each.seconds for each in phase.operators)
        assert 0 < inside <= phase.seconds
        attention = [each for each in phase.operators if each.op == "GroupQueryAttention"]
        assert [each.calls for each in attention] == [2]


def test_an_encoder_is_one_phase_and_one_prompt_token_no_decode(artifacts: Path) -> None:
    (encode,) = profile(artifacts / "encoder", Encode(2, 4), threads=1)
    (prefill,) = profile(artifacts / "concat", Generate(4, 1), threads=1)
    assert (encode.phase, prefill.phase) == ("encode", "prefill")


def test_a_silent_engine_has_no_profile(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmopt.runtime.engines.onnxruntime.OnnxRuntimeSession.profiles", False)
    assert profile(artifacts / "shared", Generate(8, 4), threads=1) == []


def test_calls_of_tvm_are_told_apart_by_their_number() -> None:
    watch = Stopwatch({"decode": {"linear": ["layers.0.mlp", "layers.1.mlp"]}})
    with watch.running("decode"):
        for name in ("vm.builtin.alloc_tensor", "linear", "linear", "linear", "other"):
            for before in (True, False):
                assert watch(None, name, before, None) == 0
    watch.off = True
    assert watch(None, "linear", 1, None) == 0

    (run,) = watch.runs
    assert [o.module for o in run.operators] == ["layers.0.mlp", "layers.1.mlp", "", ""]
    assert sum(o.seconds for o in run.operators) <= run.seconds
    assert all(o.kernel_s <= o.seconds for o in run.operators)


def test_what_tvm_takes_to_tell_of_calls_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    watch = Stopwatch({"decode": {"linear": ["layers.0.mlp", "layers.1.mlp"]}})

    def call(name: str, seconds: float = 0.0) -> None:
        nonlocal now
        for before in (True, False):
            now += 2.0  # to be told
            watch(None, name, before, None)
            now += seconds * before

    with watch.running("decode"):
        call("vm.builtin.match_shape")
        call("linear", 10.0)
        call("vm.builtin.alloc_tensor")
        call("vm.builtin.tuple_getitem")
        call("linear", 20.0)
        now += 1.0  # to give the result back
        call("vm.builtin.null_value")

    (run,) = watch.runs
    assert run.seconds == pytest.approx(31.0)
    assert [(o.kernel_s, o.seconds) for o in run.operators] == [(10.0, 10.0), (20.0, 20.0)]
