"""Opening artifacts and feeding them by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from support.tiny_artifacts import (
    GROUPS,
    LAYERS,
    VOCABULARY,
    WIDTH,
    TinyDecoder,
    TinyEncoder,
    rewrite_manifest,
)

from llmopt.errors import ArtifactError, BackendUnavailableError, LlmoptError, UsageError
from llmopt.interface.stepping import Sequences
from llmopt.runtime import Runner, load
from llmopt.runtime.cores import usable_cores

REFERENCE = TinyDecoder()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return TinyDecoder().write(tmp_path / "a")


def test_threads_are_those_asked_for_or_all_the_process_has(artifact: Path) -> None:
    assert load(str(artifact), threads=1).session.threads == 1
    assert load(artifact).session.threads == usable_cores()
    with pytest.raises(UsageError, match="threads 0"):
        load(artifact, threads=0)


def test_a_missing_onnxruntime_is_an_error_with_the_line_to_install_it(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'llmopt\[runtime\]'"):
        load(artifact)


def test_an_absent_provider_is_an_error(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["Azure"])
    monkeypatch.setattr(onnxruntime, "get_ep_devices", list)
    with pytest.raises(BackendUnavailableError, match="has no CPUExecutionProvider, only"):
        load(artifact)


def test_a_provider_that_falls_back_is_an_error(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fallen = SimpleNamespace(get_providers=lambda: ["OtherProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: fallen)
    with pytest.raises(BackendUnavailableError, match="CPUExecutionProvider did not start"):
        load(artifact)


def test_a_target_this_runtime_does_not_run_is_an_error(artifact: Path) -> None:
    rewrite_manifest(artifact, target="onnxruntime-cpu{threads=2}")
    load(artifact)
    rewrite_manifest(artifact, target="no-such-target{sm=89}")
    with pytest.raises(BackendUnavailableError, match="'no-such-target' cannot run here"):
        load(artifact)


def test_what_is_no_artifact_is_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not found"):
        load(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        load(tmp_path)
    with pytest.raises(ArtifactError, match="neither an artifact, a directory"):
        load(artifact / "model.onnx")


def test_a_damaged_model_is_an_artifact_error(artifact: Path) -> None:
    size = (artifact / "model.onnx").stat().st_size
    (artifact / "model.onnx").write_bytes(b"\xff" * size)
    rewrite_manifest(artifact, versions={"onnxruntime": "0.1"})
    with pytest.raises(ArtifactError, match=r"cannot open it: .*made with onnxruntime 0\.1"):
        load(artifact)


def test_a_file_of_another_size_is_an_artifact_error(artifact: Path) -> None:
    with (artifact / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(
        ArtifactError, match=r"model\.onnx has \d+ bytes, not \d+ as in the manifest"
    ):
        load(artifact)


def test_names_that_the_model_lacks_are_an_artifact_error(artifact: Path) -> None:
    text = (artifact / "manifest.json").read_text()
    (artifact / "manifest.json").write_text(text.replace('"position_ids"', '"place_ids"'))
    with pytest.raises(ArtifactError, match="the manifest lists 'place_ids'"):
        load(artifact)


def test_run_fills_in_what_follows_from_the_tokens(decoder: Runner) -> None:
    ids = np.random.default_rng(0).integers(0, 256, (2, 5))
    got = decoder.run({"input_ids": ids})
    expected = REFERENCE.logits(ids)[:, -1:]
    assert np.abs(got["logits"] - expected).max() / np.abs(expected).max() < 1e-5
    assert list(got) == list(decoder.session.outputs)
    everything = decoder.run({"input_ids": ids, "logits_to_keep": np.array(0)})
    assert everything["logits"].shape == (2, 5, VOCABULARY)


def test_run_counts_positions_from_the_mask(decoder: Runner) -> None:
    ids = np.random.default_rng(0).integers(0, 256, (1, 6))
    mask = np.array([[0, 0, 1, 1, 1, 1]])
    got = decoder.run({"input_ids": ids, "attention_mask": mask})["logits"]
    expected = REFERENCE.logits(ids[:, 2:])[:, -1:]
    assert np.abs(got - expected).max() / np.abs(expected).max() < 1e-5


def test_run_takes_a_past_by_hand(folders: Path) -> None:
    runner = load(folders / "concat", threads=1)
    ids = np.random.default_rng(0).integers(0, 256, (1, 6))
    first = runner.run({"input_ids": ids[:, :5]})
    feeds = {
        f"past_key_values.{i}.{part}": first[f"present.{i}.{part}"]
        for i in range(LAYERS)
        for part in ("key", "value")
    }
    feeds |= {"input_ids": ids[:, 5:], "attention_mask": np.ones((1, 6), np.int64)}
    with pytest.raises(UsageError, match=r"'position_ids' is missing: int64 \[B, S\]"):
        runner.run(feeds)
    got = runner.run(feeds | {"position_ids": np.array([[5]])})["logits"]
    expected = REFERENCE.logits(ids)[:, -1:]
    assert np.abs(got - expected).max() / np.abs(expected).max() < 1e-5


def test_run_of_an_encoder_fills_in_token_types(folders: Path) -> None:
    encoder = load(folders / "encoder", threads=1)
    got = encoder.run({"input_ids": np.array([[1, 2, 3]])})
    expected = TinyEncoder().hidden([1, 2, 3])
    assert np.abs(got["last_hidden_state"][0] - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("feeds", "problem"),
    [
        ({"ids": [[1]]}, "no input 'ids'; its inputs: input_ids, attention_mask"),
        ({}, r"input 'input_ids' is missing: int64 \[B, S\]"),
        ({"input_ids": np.array([[1.0]])}, r"takes int64 \[B, S\], not float64 \[1, 1\]"),
        ({"input_ids": np.array([1])}, r"takes int64 \[B, S\], not int64 \[1\]"),
        (
            {"input_ids": [[1]], "position_ids": [[1], [2]]},
            "B is 1 in input 'input_ids' and 2 in input 'position_ids'",
        ),
        (
            {"past_key_values.0.key": np.zeros((1, GROUPS + 1, 0, WIDTH), np.float32)},
            rf"takes float32 \[B, {GROUPS}, P, {WIDTH}\], not float32 \[1, {GROUPS + 1}, 0",
        ),
    ],
)
def test_run_says_what_is_wrong(folders: Path, feeds: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        load(folders / "concat", threads=1).run(feeds)


def test_what_onnxruntime_refuses_is_one_line(decoder: Runner) -> None:
    with pytest.raises(LlmoptError, match="could not run the model: ") as caught:
        decoder.run({"input_ids": np.array([[VOCABULARY + 5]])})
    assert "\n" not in str(caught.value)


def test_failures_inside_a_step_are_llmopt_errors(decoder: Runner) -> None:
    sequences = Sequences(decoder.session, 1, 8)
    with pytest.raises(LlmoptError, match="could not run the model: "):
        sequences.extend(np.array([[VOCABULARY + 5]]))
