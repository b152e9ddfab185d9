"""The manifest: what is written is read, and what is wrong is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifact.manifest import FileRecord, Manifest, record_files, sha256
from llmopt.errors import ArtifactError
from llmopt.interface.facts import ModelFacts, SourceRecord
from llmopt.interface.signature import Port, Role, Signature

FULL = Manifest(
    target="onnxruntime-cpu",
    entry="model.onnx",
    task="generate",
    versions={"llmopt": "0.1.0", "opset": 25},
    source=SourceRecord("SmolLM2", "gguf", "ab" * 32),
    pipeline="default",
    precision={"scheme": "w4", "é": [1, None]},
    signature=Signature(
        (
            Port("input_ids", Role.TOKENS, "int64", ("B", "S")),
            Port("past_key_values.1.key", Role.PAST_KEY, "float32", ("B", 3, "P", 64), 1),
        ),
        (Port("logits", Role.LOGITS, "float32", ("B", "K", "V")),),
    ),
    model=ModelFacts("llama", 2, 9, 3, 64, 576, 49152, 8192, 1, (2, 3), None, "shared", None),
    files=(FileRecord("golden/a.npz", 3, "0" * 64),),
    verification={"status": "passed"},
    quality={"kl_mean": 0.001},
)
WHERE = Path("manifest.json")


PORT = {"name": "x", "role": "other", "dtype": "int64", "shape": []}


def changed(**changes: Any) -> str:
    return json.dumps(json.loads(FULL.to_json()) | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "golden").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"abc")
    (tmp_path / "golden/a.npz").write_bytes(b"")
    (tmp_path / "build-report.json").write_text("{}")
    FULL.with_files(tmp_path).write(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "manifest", [FULL, Manifest(target="onnxruntime-cpu", entry="m.onnx", task="raw")]
)
def test_what_is_written_is_read(manifest: Manifest, tmp_path: Path) -> None:
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest


def test_the_same_manifest_is_the_same_bytes(tmp_path: Path) -> None:
    FULL.write(tmp_path)
    first = (tmp_path / "manifest.json").read_bytes()
    Manifest.read(tmp_path).write(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == first
    assert first.endswith(b"}\n")
    keys = list(json.loads(first))
    assert keys == sorted(keys)


def test_unknown_keys_are_ignored_at_every_depth() -> None:
    data = json.loads(FULL.to_json()) | {"new": 1}
    for part in (data["model"], data["source"], data["signature"]["inputs"][0], data["files"][0]):
        part["new"] = {"er": 2}
    assert Manifest.from_json(json.dumps(data), WHERE) == FULL


def test_files_lists_all_but_itself_and_the_report(folder: Path) -> None:
    records = Manifest.read(folder).files
    assert [(r.path, r.size_bytes) for r in records] == [("golden/a.npz", 0), ("model.onnx", 3)]
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180's "abc"
    assert records[1].sha256 == sha256(folder / "model.onnx") == known


def test_an_untouched_artifact_verifies(folder: Path) -> None:
    (folder / "build-report.json").write_text("other times")
    manifest = Manifest.read(folder)
    manifest.check_sizes(folder)
    manifest.verify_files(folder)
    assert record_files(folder) == manifest.files


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        (None, "model.onnx is missing"),
        (b"ab", "model.onnx has 2 bytes, not 3 as in the manifest"),
        (b"abd", "model.onnx has sha256 a52d159f262b…, not ba7816bf8f01… as in the manifest"),
    ],
)
def test_a_changed_file_is_found(folder: Path, contents: bytes | None, problem: str) -> None:
    (folder / "model.onnx").unlink()
    if contents is not None:
        (folder / "model.onnx").write_bytes(contents)
    with pytest.raises(ArtifactError, match=problem):
        Manifest.read(folder).verify_files(folder)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "the top level is not a JSON object"),
        (changed(schema=2), "schema 2 is unknown; this llmopt reads 1.*update llmopt"),
        (changed(schema="1"), "schema should be an integer"),
        (changed(schema=True), "schema should be an integer"),
        ("{}", "schema is missing"),
        ('{"schema": 1}', "target is missing"),
        (changed(target=3), "target should be a string"),
        (changed(quality=[1]), "quality should be an object"),
        (changed(files={"a": 1}), "files should be a list"),
        (changed(files=["a"]), r"files\[0\] is not a JSON object"),
        (changed(files=[{"path": "a"}]), r"files\[0\]\.size_bytes is missing"),
        (changed(model={"cache": "ring"}), "model.cache should be 'shared', 'concat' or 'none'"),
        (changed(model={"eos": ["a"]}), "model.eos should be a list of integers"),
        (changed(model={"bos": "a"}), "model.bos should be an integer"),
        (changed(model={"pooling": 1}), "model.pooling should be a string"),
        (
            changed(
                signature={"inputs": [{"name": "x", "role": "other", "dtype": "", "shape": [1.5]}]}
            ),
            r"signature\.inputs\[0\]\.shape should be a list of integers and names",
        ),
        (
            changed(signature={"inputs": [PORT | {"role": "soul"}]}),
            "role should be a known role, not 'soul'",
        ),
    ],
)
def test_what_is_wrong_is_said(text: str, problem: str) -> None:
    with pytest.raises(ArtifactError, match=problem):
        Manifest.from_json(text, WHERE)


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret", "a/../../b", "a\\..\\b"])
def test_a_path_out_of_the_artifact_is_refused(path: str) -> None:
    text = changed(files=[{"path": path, "size_bytes": 0, "sha256": ""}])
    with pytest.raises(ArtifactError, match="a path inside the artifact"):
        Manifest.from_json(text, WHERE)


def test_what_cannot_be_read_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="not UTF-8"):
        Manifest.read(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(ArtifactError, match="Is a directory"):
        Manifest.read(tmp_path)
