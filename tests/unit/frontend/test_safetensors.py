"""Safetensors files are read exactly, and damaged ones are refused in one line."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmopt.errors import SourceError, SourceNotFoundError
from llmopt.frontend.huggingface.checkpoint import digest, open_checkpoint
from llmopt.frontend.huggingface.safetensors import SafetensorsCheckpoint

RANDOM = np.random.default_rng(7)


def tensors() -> dict[str, np.ndarray]:
    return {
        "a": RANDOM.standard_normal((3, 5)).astype(np.float32),
        "b": RANDOM.standard_normal(7).astype(np.float16),
        "c": np.arange(6, dtype=np.int64).reshape(1, 2, 3),
        "flag": np.array([True, False]),
        "scalar": np.array(2.5, np.float64),
        "empty": np.zeros((0, 4), np.float32),
    }


def save(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    from safetensors.numpy import save_file

    save_file(arrays, path, metadata={"format": "pt"})
    return path


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_every_tensor_is_read_as_it_was_saved(tmp_path: Path) -> None:
    expected = tensors()
    opened = open_checkpoint(save(tmp_path / "model.safetensors", expected))
    assert isinstance(opened, SafetensorsCheckpoint)
    assert set(opened.names()) == set(expected)
    for name, array in expected.items():
        assert opened.shape(name) == array.shape
        assert opened.dtype(name) == array.dtype.name
        read = opened.read(name)
        assert read.dtype == array.dtype
        assert not isinstance(read.base, np.memmap)
        np.testing.assert_array_equal(read, array)


def test_bfloat16_and_float8_keep_their_bits(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    values = {
        "bf16": torch.tensor([1.0, -0.1, 3e38]).bfloat16(),
        "e4m3": torch.tensor([0.5, -448.0]).to(torch.float8_e4m3fn),
        "e5m2": torch.tensor([0.25, 57344.0]).to(torch.float8_e5m2),
    }
    save_file(values, tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path)
    assert opened.read("bf16").dtype == ml_dtypes.bfloat16
    for name, tensor in values.items():
        np.testing.assert_array_equal(opened.read(name).astype(np.float32), tensor.float().numpy())


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    arrays = tensors()
    first = {name: arrays[name] for name in ("a", "b")}
    save(tmp_path / "model-1.safetensors", first)
    save(tmp_path / "model-2.safetensors", {n: arrays[n] for n in arrays if n not in first})
    index = {name: f"model-{1 if name in first else 2}.safetensors" for name in arrays}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        opened = open_checkpoint(path)
        assert set(opened.names()) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(opened.read(name), array)


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        ({"a": "gone.safetensors"}, "1 of 1 shards are missing: gone.safetensors"),
        ({"z": "model-1.safetensors"}, "lacks 1 tensors that the index lists, first 'z'"),
        ({"a": "../model-1.safetensors"}, "outside its folder"),
        ({"a": 3}, "outside its folder"),
        ({}, "lists no tensors"),
        ([], "not an index"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, weight_map: Any, problem: str) -> None:
    save(tmp_path / "model-1.safetensors", {"a": np.zeros(2, np.float32)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(SourceError, match=problem.replace("(", r"\(")):
        open_checkpoint(tmp_path)


def test_an_index_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(SourceError, match="not an index of shards"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -5, -1])
def test_a_truncated_file_is_refused_at_open_with_byte_counts(tmp_path: Path, keep: int) -> None:
    path = save(tmp_path / "model.safetensors", tensors())
    data = path.read_bytes()[:keep]
    path.write_bytes(data)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(tmp_path)
    assert f"{len(data)}" in str(caught.value)
    assert "\n" not in str(caught.value)


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "'b' at byte .* overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 16)}, "'b' at byte .* follows a hole"),
        ({"a": entry(4, 16)}, "follows a hole"),
        ({"a": entry(0, 20)}, "truncated: expected .* bytes, the file has"),
        ({"a": entry(0, 8)}, "bytes after its last tensor"),
        ({"a": entry(0, 16, [3])}, "= 12 bytes, its offsets span 16"),
        ({"a": entry(0, 16, [2**62, 4])}, "its offsets span 16"),
        ({"a": entry(0, 16, dtype="F4")}, "dtype 'F4', known: F64"),
        ({"a": entry(0, 16, [-4])}, "malformed"),
        ({"a": entry(0, 16, [4.0])}, "malformed"),
        ({"a": entry(0, 16, [True])}, "malformed"),
        ({"a": entry(0, 16, 4)}, "malformed"),
        ({"a": entry(0, 16, dtype=None)}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}, "malformed"),
        ({"a": {"dtype": "F32"}}, "malformed"),
        ({"a": 3}, "malformed"),
        ([1], "not a JSON object"),
        (b'{"a": ', "not valid JSON"),
        (b'{"a": 1, "a": 2}', "appears twice"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"{" + b'"a":{' * 100_000, "not valid JSON"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: Any, problem: str) -> None:
    path = raw(tmp_path / "model.safetensors", header, bytes(16))
    with pytest.raises(SourceError, match=problem) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_an_absurd_header_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(SourceError, match="implausible header size of"):
        open_checkpoint(path)


def test_a_file_cut_while_in_use_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", {"a": np.ones(1000, np.float32)})
    opened = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SourceError, match="990 of 1000 elements"):
        opened.read("a")
    path.unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        opened.read("a")


def test_a_folder_prefers_safetensors_and_a_lone_file_of_any_name_will_do(tmp_path: Path) -> None:
    import torch

    save(tmp_path / "weights.safetensors", {"a": np.ones(2, np.float32)})
    assert list(open_checkpoint(tmp_path).names()) == ["a"]
    torch.save({"b": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(open_checkpoint(tmp_path).names()) == ["b"]
    save(tmp_path / "model.safetensors", {"c": np.ones(2, np.float32)})
    assert list(open_checkpoint(tmp_path).names()) == ["c"]


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(tmp_path / f"{name}.safetensors", {name: np.ones(2, np.float32)})
    with pytest.raises(SourceError, match=r"holds 2 \.safetensors files and no index"):
        open_checkpoint(tmp_path)


def test_a_config_without_weights_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceNotFoundError, match="the folder has no weights"):
        open_checkpoint(tmp_path)
    with pytest.raises(SourceNotFoundError):
        digest(tmp_path)
    with pytest.raises(SourceNotFoundError):
        open_checkpoint(tmp_path / "missing.safetensors")
    with pytest.raises(SourceNotFoundError):
        digest(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("m.safetensors", b"", "is empty"),
        ("m.onnx", b"\x08\x07\x12\x04test", "unknown kind of weights file"),
    ],
)
def test_what_is_not_weights_is_named(tmp_path: Path, name: str, data: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError, match=problem):
        open_checkpoint(tmp_path / name)


def test_the_digest_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    import hashlib

    path = save(tmp_path / "model.safetensors", tensors())
    assert digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_digest_of_a_folder_covers_weights_and_config_only(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"a": np.ones(2, np.float32)})
    plain = digest(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert digest(tmp_path) == plain
    (tmp_path / "config.json").write_text("{}")
    configured = digest(tmp_path)
    assert configured != plain
    save(tmp_path / "model.safetensors", {"a": np.zeros(2, np.float32)})
    assert digest(tmp_path) not in {plain, configured}


def test_the_digest_covers_every_shard(tmp_path: Path) -> None:
    for number in (1, 2):
        save(tmp_path / f"{number}.safetensors", {f"t{number}": np.ones(2, np.float32)})
    index = {"weight_map": {"t1": "1.safetensors", "t2": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    before = digest(tmp_path)
    save(tmp_path / "2.safetensors", {"t2": np.zeros(2, np.float32)})
    assert digest(tmp_path) != before


def test_numbers_are_widened_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import save_file

    monkeypatch.setattr("llmopt.frontend.huggingface.safetensors._PART", 5)
    made = {"narrow": torch.randn(3, 7).bfloat16(), "wide": torch.randn(4), "none": torch.empty(0)}
    save_file(made, tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path / "model.safetensors")

    for name, tensor in made.items():
        found = opened.read_float32(name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, tensor.float().numpy())
