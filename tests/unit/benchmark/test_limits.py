"""What a run has to do, what the machine can do at most, and the fraction between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from llmopt.benchmark import Encode, Generate, Inputs, ceilings
from llmopt.benchmark.ceilings import Ceilings
from llmopt.benchmark.machine import this_machine
from llmopt.benchmark.results import ArtifactResult, Metric
from llmopt.benchmark.roofline import phases, reached
from llmopt.benchmark.tiny_model import product_model

WORK = {
    "products": {
        "token": {"macs": {"int8": 1000}, "weight_bytes": 500},
        "kept": {"macs": {"float32": 200}, "weight_bytes": 800},
    },
    "attention_macs": 3,
    "cache_bytes": 7,
    "lookup_bytes": 11,
    "other_bytes": 13,
}
LIMITS = Ceilings(2, 1e6, {"int8": 1e8, "float32": 1e7}, cache_bytes=1000)


def test_a_prompt_multiplies_by_every_weight_for_each_token() -> None:
    prefill, decode = phases(WORK, Generate(10, 5, batch=2))

    assert prefill.macs == {"int8": 20_000, "float32": 2 * 200 + 2 * 55 * 3}
    assert prefill.read_bytes == 500 + 800 + 13 + 20 * 11
    assert decode.macs == {"int8": 2000, "float32": 2 * 200 + 2 * 12 * 3}
    assert decode.read_bytes == 500 + 800 + 13 + 2 * 11 + 2 * 12 * 7


def test_an_encoder_attends_to_everything() -> None:
    (encode,) = phases(WORK, Encode(2, 4))
    assert encode.macs == {"int8": 8000, "float32": 2 * 200 + 2 * 16 * 3}


def test_what_is_not_known_has_no_phases() -> None:
    assert list(phases({}, Generate(1, 1))) == []
    assert list(phases(WORK, Inputs("x.npz"))) == []
    assert len(list(phases(WORK, Generate(4, 1)))) == 1


def test_the_fraction_is_the_longer_of_reading_and_multiplying() -> None:
    metrics = (Metric("ttft_s", (0.004,)), Metric("time_per_output_token_s", (0.002,)))
    prefill, decode = reached(WORK, Generate(10, 5), _result(metrics), LIMITS)

    multiply = 10_000 / 1e8 + (200 + 55 * 3) / 1e7
    assert prefill["multiply_s"] == pytest.approx(multiply)
    assert prefill["read_s"] == pytest.approx(1423e-6)
    assert prefill["bound"] == "memory"
    assert prefill["fraction"] == pytest.approx(1423e-6 / 0.004)
    assert decode["bound"] == "memory"
    assert not decode["in_cache"]


def test_a_limit_that_is_not_known_is_left_open() -> None:
    unknown = Ceilings(1, 1e9, {"float32": 1e3}, cache_bytes=10**6)
    (prefill,) = reached(WORK, Generate(10, 5), _result((Metric("ttft_s", (1.0,)),)), unknown)
    assert prefill["multiply_s"] is None
    assert prefill["in_cache"]


def _result(metrics: tuple[Metric, ...]) -> ArtifactResult:
    return ArtifactResult("a", "onnxruntime-cpu", 1, metrics)


@pytest.mark.parametrize(
    ("op", "x", "w", "y"),
    [("MatMul", "float32", "float32", "float32"), ("MatMulInteger", "uint8", "int8", "int32")],
)
def test_the_model_of_a_product_is_what_onnx_would_write(op: str, x: str, w: str, y: str) -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(-100, 100, (3, 5)).astype(w)
    given = rng.integers(0, 100, (4, 3)).astype(x)
    model = product_model(op, weight, (x, [4, 3]), y)

    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": given})
    assert found.dtype == y
    assert (found == given.astype(np.int64) @ weight.astype(np.int64)).all()


def test_ceilings_are_measured_for_what_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_SIZE", 64)
    monkeypatch.setattr(ceilings, "_MIN_BYTES", 1 << 16)
    monkeypatch.setattr(ceilings, "cache_bytes", lambda: 1 << 10)
    found = ceilings.measure_ceilings(1, frozenset({"float32", "int8", "bfloat16"}))

    assert set(found.macs_per_s) == {"float32", "int8"}
    assert found.by["int8"] == "onnxruntime"
    assert all(rate > 1e6 for rate in (*found.macs_per_s.values(), found.read_bytes_per_s))
    assert found.to_dict()["cache_bytes"] == 1 << 10


def test_without_onnxruntime_numpy_multiplies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_SIZE", 64)
    monkeypatch.setattr(ceilings, "read_bytes_per_s", lambda _: 1.0)
    monkeypatch.setattr(ceilings, "find_spec", lambda _: None)
    found = ceilings.measure_ceilings(1, frozenset({"float32", "int8"}))
    assert found.by == {"float32": "numpy"}


def test_the_largest_cache_is_the_last(tmp_path: Path) -> None:
    for number, size in enumerate(("48K", "2048K", "30M", "odd")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n")
    assert ceilings.cache_bytes(tmp_path) == 30 << 20
    assert ceilings.cache_bytes(tmp_path / "nothing") == 0


def test_memory_to_read_is_bounded_by_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "cache_bytes", lambda: 1 << 50)
    whole = this_machine().memory_bytes
    assert whole is not None
    assert ceilings.memory_to_read() == min(ceilings._memory_limits()) // 4 <= whole // 4


def test_a_container_s_memory_is_a_limit(tmp_path: Path) -> None:
    whole = this_machine().memory_bytes
    (tmp_path / "memory.max").write_text("max\n")
    assert list(ceilings._memory_limits(tmp_path)) == [whole]
    (tmp_path / "memory.max").write_text("4096\n")
    assert list(ceilings._memory_limits(tmp_path)) == [whole, 4096]
