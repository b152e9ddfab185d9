"""llmopt inspect: artifacts, ONNX files and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_sources import LAYERS, VOCABULARY, gguf_file, llama_folder

from llmopt.cli.inspect import _count


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_an_artifact_shows_what_it_is_and_takes(llmopt: Any, made: Path) -> None:
    result = llmopt("inspect", made / "shared")

    assert result.exit_code == 0, result.stderr
    lines = words(result.stdout)
    assert ["task", "generate"] in lines
    assert ["in", "input_ids", "int64", "[B,", "S]", "tokens"] in lines
    assert "past_key_values.0.key" in result.stdout
    assert "past_key_values.1.key" not in result.stdout
    assert "the cache is listed for layer 0 of 2; the others are alike" in result.stdout
    assert ["verified", "no", "(--verify"] in [line[:3] for line in lines]
    assert "model.onnx" in result.stdout


def test_an_artifact_as_json_is_its_manifest(llmopt: Any, made: Path) -> None:
    data = json.loads(llmopt("inspect", made / "encoder", "--json").stdout)

    assert data["kind"] == "artifact"
    assert data["manifest"] == json.loads((made / "encoder" / "manifest.json").read_text())


def test_an_onnx_file_shows_operators_and_weights(llmopt: Any, bigram: Path) -> None:
    shown = words(llmopt("inspect", bigram).stdout)
    data = json.loads(llmopt("inspect", bigram, "--json").stdout)

    assert ["MatMul", "1"] in shown
    assert ["opsets", "ai.onnx", "25"] in shown
    assert data["operators"] == {"Gather": 1, "LayerNormalization": 1, "MatMul": 1}
    assert data["parameters"] == VOCABULARY * 8 * 2 + 8
    assert data["inputs"] == ["input_ids int64 [B, S]"]
    assert data["types"] == {"float": {"tensors": 3, "parameters": 968}}


def test_external_weights_need_not_be_there(llmopt: Any, bigram: Path, tmp_path: Path) -> None:
    line = ["--target", "cpu", "--verify", "off", "-o", tmp_path / "out"]
    llmopt("compile", bigram, *line)
    (tmp_path / "out" / "model.onnx.data").unlink(missing_ok=True)

    result = llmopt("inspect", tmp_path / "out" / "model.onnx", "--json")

    assert json.loads(result.stdout)["parameters"] >= VOCABULARY * 8


def test_a_folder_shows_architecture_and_types(llmopt: Any, tmp_path: Path) -> None:
    llama_folder(tmp_path / "llama")
    data = json.loads(llmopt("inspect", tmp_path / "llama", "--json").stdout)

    assert data["architecture"] == "llama (LlamaForCausalLM)"
    assert (data["layers"], data["heads"], data["kv_heads"]) == (LAYERS, 4, 2)
    assert data["tensors"] == 2 + 9 * LAYERS
    assert data["types"]["float32"]["parameters"] == data["parameters"]
    assert data["compiles"] == "yes, as family llama"
    shown = llmopt("inspect", tmp_path / "llama").stdout
    assert "layers 2, heads 4, key/value heads 2" in shown


def test_an_architecture_that_is_unknown_is_shown_all_the_same(llmopt: Any, tmp_path: Path) -> None:
    llama_folder(tmp_path / "odd", model_type="odd", architectures=[])
    data = json.loads(llmopt("inspect", tmp_path / "odd", "--json").stdout)

    assert data["architecture"] == "odd"
    assert data["layers"] == LAYERS
    assert data["compiles"].startswith("no: ")


def test_weights_alone_have_no_architecture(llmopt: Any, tmp_path: Path) -> None:
    llama_folder(tmp_path / "llama")
    (tmp_path / "llama" / "config.json").unlink()

    result = llmopt("inspect", tmp_path / "llama" / "model.safetensors")

    assert "no config.json" in result.stdout
    assert "float32" in result.stdout


def test_a_gguf_file_shows_types_even_if_it_does_not_compile(llmopt: Any, tmp_path: Path) -> None:
    gguf_file(tmp_path / "model.gguf")
    for path in (tmp_path / "model.gguf", tmp_path):
        data = json.loads(llmopt("inspect", path, "--json").stdout)

        assert data["architecture"] == "llama"
        assert data["tensors"] == 1
        assert data["compiles"].startswith("no: ")


def test_a_broken_config_is_told(llmopt: Any, tmp_path: Path) -> None:
    llama_folder(tmp_path / "llama")
    (tmp_path / "llama" / "config.json").write_text("{", encoding="utf-8")

    result = llmopt("inspect", tmp_path / "llama")

    assert result.exit_code == 1
    assert "not JSON" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "code", "says"),
    [
        ("notes.txt", b"hello", 1, "unsupported kind of file"),
        ("model.onnx", b"\xff\xff\xff", 1, "not an ONNX model"),
        ("model.onnx", b"", 1, "without nodes"),
        ("model.gguf", b"GGUF", 1, "truncated"),
    ],
)
def test_other_files_are_refused(  # noqa: PLR0913, PLR0917 - pytest
    name: str, content: bytes, code: int, says: str, llmopt: Any, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)

    result = llmopt("inspect", tmp_path / name)

    assert result.exit_code == code
    assert says in result.stderr


def test_nothing_is_not_found(llmopt: Any, tmp_path: Path) -> None:
    result = llmopt("inspect", tmp_path / "nothing")

    assert result.exit_code == 2
    assert "not found" in result.stderr


def test_counts_are_short() -> None:
    assert [_count(n) for n in (7, 1234, 22_700_000, 1_240_000_000)] == [
        "7",
        "1.23 k",
        "22.7 M",
        "1.24 G",
    ]
    assert np.isfinite(float(_count(999)))
