"""The self-test: what an artifact shows of itself on a device, and what it finds wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bare_device import ONNXRUNTIME, on_device
from support.tiny_artifacts import TinyDecoder, TinyEncoder, rewrite_manifest

from llmopt.artifact.manifest import Manifest
from llmopt.errors import ArtifactError, BackendUnavailableError
from llmopt.runtime import load
from llmopt.runtime import selftest as module
from llmopt.runtime.__main__ import main
from llmopt.runtime.golden import Golden, columns_of, kept
from llmopt.runtime.memory import peak_bytes
from llmopt.runtime.selftest import selftest

TEXT = "Hello"


def with_example(folder: Path, example: Golden) -> Path:
    """Write an example into an artifact, listed in its manifest."""
    example.write(folder)
    Manifest.read(folder).with_files(folder).write(folder)
    return folder


def decoder_example(**changes: Any) -> Golden:
    """Return tokens and logits that numpy computes, one row padded in front."""
    ids = np.array([list(b"Hello, world"), list(b"The sky is b")], np.int64)
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    logits = TinyDecoder().logits(ids, mask).astype(np.float32)
    columns = columns_of(logits)
    made = Golden(
        inputs={"input_ids": ids, "attention_mask": mask},
        outputs={
            "columns": columns,
            "logits": np.take_along_axis(logits, columns.astype(np.int64), axis=-1),
        },
        scales={"logits": float(np.abs(logits[mask == 1]).max())},
        tolerance=1e-4,
        prefill=5,
        text=TEXT,
        tokens=tuple(TEXT.encode()),
        producer="numpy",
    )
    return replace(made, **changes)


def encoder_example() -> Golden:
    ids = np.array([[5, 6, 7, 8], [9, 10, 11, 0]], np.int64)
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.int64)
    rows = [
        TinyEncoder().hidden(row[real == 1].tolist()) for row, real in zip(ids, mask, strict=True)
    ]
    hidden = np.concatenate(rows).astype(np.float32)
    pooled = np.stack([row.mean(axis=0) for row in rows]).astype(np.float32)
    return Golden(
        inputs={"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)},
        outputs={
            "last_hidden_state": kept(hidden, None),
            "sentence_embedding": kept(pooled, None),
        },
        scales={"last_hidden_state": 1.0, "sentence_embedding": 1.0},
        tolerance=1e-4,
    )


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    return with_example(TinyDecoder().write(tmp_path / "decoder"), decoder_example())


def found_of(artifact: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the JSON of ``--selftest --json``."""
    code = main([str(artifact), "--selftest", "--json", "--threads", "1"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    return code, found


def test_a_decoder_that_computes_what_numpy_computes_passes(
    decoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = found_of(decoder, capsys)

    assert code == 0
    assert found["passed"] is True
    checks = {check["name"]: check for check in found["checks"]}
    assert list(checks) == ["files", "tokenizer", "logits", "best token"]
    assert all(check["passed"] for check in checks.values())
    assert checks["logits"]["compared"] == 21 * 96
    assert 0 < checks["logits"]["error_rel"] <= checks["logits"]["tolerance"] == 1e-4
    assert checks["best token"]["compared"] == 21
    assert found["load_s"] > 0
    assert set(found["speed"]) == {"prefill_tokens_per_s", "decode_tokens_per_s"}
    assert found["peak_memory_bytes"] > 10_000_000
    assert found["machine"]["onnxruntime"]
    assert (found["target"], found["error"]) == ("onnxruntime-cpu", None)


@pytest.mark.parametrize("cache", ["concat", "none"])
def test_every_kind_of_cache_passes(cache: Any, tmp_path: Path) -> None:
    folder = with_example(TinyDecoder(cache).write(tmp_path / "decoder"), decoder_example())

    assert selftest(folder, threads=1).passed


def test_an_encoder_passes(tmp_path: Path) -> None:
    folder = with_example(TinyEncoder().write(tmp_path / "encoder"), encoder_example())

    found = selftest(folder, threads=1)

    assert found.passed
    assert [check.name for check in found.checks] == [
        "files",
        "last_hidden_state",
        "sentence_embedding",
    ]
    assert [check.compared for check in found.checks[1:]] == [84, 24]
    assert set(found.speed) == {"runs_per_s"}


def spoiled(name: str) -> Golden:
    """Return an example with one thing in it that no artifact gives."""
    example = decoder_example()
    outputs = dict(example.outputs)
    if name == "logits":
        outputs["logits"] = outputs["logits"].copy()
        outputs["logits"][0, 7, 40] += 0.1
    if name == "best token":
        outputs["columns"] = outputs["columns"].copy()
        outputs["columns"][0, 7, [0, 50]] = outputs["columns"][0, 7, [50, 0]]
    tokens = (1, 2) if name == "tokenizer" else example.tokens
    return replace(example, outputs=outputs, tokens=tokens)


@pytest.mark.parametrize("name", ["logits", "best token", "tokenizer"])
def test_what_is_off_is_named_and_fails(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_example(TinyDecoder().write(tmp_path / "decoder"), spoiled(name))

    assert main([str(folder), "--selftest", "--threads", "1"]) == 1

    said = capsys.readouterr().out
    assert f"FAIL  {name}" in said
    assert said.splitlines()[-1].endswith("FAILED")


def test_a_token_may_be_off_where_so_much_is_allowed(tmp_path: Path) -> None:
    folder = TinyDecoder().write(tmp_path / "decoder")
    few = replace(spoiled("logits"), counted=0.95)

    assert selftest(with_example(folder, few), threads=1).passed
    assert not selftest(with_example(folder, replace(few, counted=0.99)), threads=1).passed


def test_numbers_that_are_none_fail(tmp_path: Path) -> None:
    folder = with_example(TinyDecoder().write(tmp_path / "decoder"), decoder_example())
    runner = load(folder, threads=1)

    def broken(*_given: Any, **_options: Any) -> Any:
        return np.full((2, 12, 258), np.nan, np.float32)

    runner.logits = broken  # type: ignore[method-assign]
    example = Golden.read(folder)
    assert example is not None
    checks = {check.name: check for check in module.compare(runner, example)}

    assert not checks["logits"].passed
    assert checks["logits"].error_rel is None
    assert not checks["best token"].passed


def test_a_damaged_file_ends_it_with_json_all_the_same(
    decoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = bytearray((decoder / "model.onnx").read_bytes())
    model[-100] ^= 1
    (decoder / "model.onnx").write_bytes(model)

    code, found = found_of(decoder, capsys)

    assert code == 1
    assert found["passed"] is False
    assert "model.onnx has sha256" in found["error"]


def test_a_device_that_lacks_something_is_told_apart(
    decoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite_manifest(decoder, target="tvm-riscv")

    code, found = found_of(decoder, capsys)

    assert code == 3
    assert "tvm-riscv" in found["error"]
    with pytest.raises(BackendUnavailableError):
        selftest(decoder)


def test_without_an_example_it_says_why(tmp_path: Path) -> None:
    folder = TinyDecoder().write(tmp_path / "decoder")
    with pytest.raises(ArtifactError, match="--verify off"):
        selftest(folder)
    rewrite_manifest(folder, target="tensorrt-rtx{sm=89}")
    with pytest.raises(ArtifactError, match="no engine ran where it was compiled"):
        selftest(folder)


def rewritten(folder: Path, **changes: Any) -> Path:
    path = folder / "golden" / "golden.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    Manifest.read(folder).with_files(folder).write(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"schema": 9}, "schema 9, this reads 1"),
        ({"scales": {"logits": "much"}}, "scales should be numbers by name"),
        ({"bounds": [1]}, "bounds should be an object"),
        ({"scales": {}}, "does not fit the model"),
        ({"prefill": 99}, "does not fit the model"),
        ({"prefill": 0}, "does not fit the model"),
    ],
)
def test_an_example_that_makes_no_sense_is_an_error(
    decoder: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ArtifactError, match=problem):
        selftest(rewritten(decoder, **changes), threads=1)


@pytest.mark.parametrize("name", ["golden.json", "example.npz"])
def test_an_example_that_cannot_be_read_is_an_error(decoder: Path, name: str) -> None:
    (decoder / "golden" / name).write_bytes(b"PK\x03\x04 and no more")
    Manifest.read(decoder).with_files(decoder).write(decoder)

    with pytest.raises(ArtifactError, match="its example cannot be read"):
        selftest(decoder, threads=1)


def test_the_same_example_is_the_same_bytes_and_comes_back(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        decoder_example().write(tmp_path / name)
    for file in ("golden.json", "example.npz"):
        first, second = (tmp_path / name / "golden" / file for name in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()

    found = Golden.read(tmp_path / "a")

    assert found is not None
    wanted = decoder_example()
    assert np.array_equal(found.inputs["input_ids"], wanted.inputs["input_ids"])
    assert np.array_equal(found.outputs["logits"], wanted.outputs["logits"])
    assert replace(found, inputs={}, outputs={}) == replace(wanted, inputs={}, outputs={})


def test_a_slow_device_is_measured_on_fewer_tokens(
    decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def timed(_runner: Any, _read: Any, prompt: int, steps: int) -> tuple[float, float]:
        asked.append((prompt, steps))
        return prompt * 1.0, steps * 1.0

    monkeypatch.setattr(module, "_timed", timed)
    monkeypatch.setattr(module, "_REPEATS", 1)

    golden = Golden.read(decoder) or Golden(inputs={}, outputs={}, scales={})
    speed = module._decoding(load(decoder, threads=1), golden)

    assert asked == [(1, 1), (1, 1)]
    assert speed == {"prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 1.0}


def test_memory_is_read_where_linux_tells_it(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    2048 kB\n")

    assert peak_bytes(status) == 2048 * 1024
    assert peak_bytes(tmp_path / "none") is None
    status.write_text("Name:\tpython\n")
    assert peak_bytes(status) is None


def test_a_device_needs_numpy_tokenizers_and_onnxruntime_alone(decoder: Path) -> None:
    tested = on_device(ONNXRUNTIME, decoder, "--selftest", "--json", "--threads", 1)
    spoken = on_device(ONNXRUNTIME, decoder, "--prompt", "Hello", "--max-new-tokens", 5)
    served = on_device(ONNXRUNTIME, decoder, "--serve")

    assert tested.returncode == 0, tested.stderr
    assert json.loads(tested.stdout)["passed"]
    assert spoken.stdout == load(decoder).generate("Hello", max_new_tokens=5) + "\n"
    assert served.returncode == 3
    assert "pip install 'llmopt[serve]'" in served.stderr


def test_text_and_embeddings_come_out_of_the_module(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = TinyEncoder().write(tmp_path / "encoder")

    assert main([str(decoder), "--prompt", "Hello", "--max-new-tokens", "4", "--seed", "0"]) == 0
    assert capsys.readouterr().out == load(decoder).generate("Hello", max_new_tokens=4) + "\n"
    assert main([str(encoder), "--text", "one", "two"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    np.testing.assert_allclose(rows, load(encoder).embed(["one", "two"]), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prompt", "a", "--json"], 2, "--json has no effect with --prompt"),
        (["--selftest", "--seed", "0"], 2, "--seed has no effect with --selftest"),
        (["--text", "a", "--port", "1"], 2, "--port has no effect with --text"),
        (["--text", "a"], 2, "computes no embeddings"),
        (["--prompt", "a", "--threads", "0"], 2, "threads 0 is below 1"),
        (["--serve", "--port", "99999"], 2, "port 99999"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    decoder: Path, arguments: Sequence[str], code: int, message: str, capsys: Any
) -> None:
    assert main([str(decoder), *arguments]) == code
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.startswith("Error: ")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_what_cannot_continue_text_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = TinyEncoder().write(tmp_path / "encoder")

    assert main([str(encoder), "--prompt", "a"]) == 2
    assert "needs a text-generation artifact" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), "--prompt", "a"]) == 2
    assert "not found" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([str(encoder)])
    assert ended.value.code == 2


def test_ctrl_c_and_a_closed_pipe_end_it_quietly(
    decoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmopt.runtime.load", interrupted)
    assert main([str(decoder), "--prompt", "a"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = f"{sys.executable} -m llmopt.runtime {decoder} --prompt a --max-new-tokens 40"
    piped = subprocess.run(
        ["bash", "-c", f"{command} | (exec <&-; sleep 0.1)"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert piped.stderr == ""
