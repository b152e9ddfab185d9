"""llmopt run: text, embeddings and arrays, and .npz files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmopt.errors import PickleRefusedError, SourceError
from llmopt.runtime import load
from llmopt.runtime.npz import read_npz, write_npz


def test_the_continuation_and_nothing_else_is_printed(llmopt: Any, made: Path) -> None:
    wanted = load(made / "shared").generate("The sky", max_new_tokens=7)

    result = llmopt("run", made / "shared", "--prompt", "The sky", "--max-new-tokens", 7)

    assert result.exit_code == 0
    assert result.stdout == wanted + "\n"
    assert result.stderr == ""


def test_sampling_options_arrive(llmopt: Any, made: Path) -> None:
    options: Any = {"max_new_tokens": 9, "temperature": 0.9, "top_p": 0.8, "top_k": 40, "seed": 3}
    wanted = load(made / "shared").generate("Hi", **options)
    flags = [x for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value)]

    result = llmopt("run", made / "shared", "--prompt", "Hi", "--threads", 1, *flags)

    assert result.stdout == wanted + "\n"
    assert (
        llmopt("run", made / "shared", "--prompt", "Hi", "--seed", 4, *flags[:8]).stdout != wanted
    )


def test_chat_needs_a_chat_template(llmopt: Any, made: Path) -> None:
    result = llmopt("run", made / "shared", "--prompt", "Hi", "--chat")

    assert result.exit_code == 2
    assert "chat" in result.stderr


@pytest.mark.parametrize("flags", [["--text", "one", "--text", "two"], ["--text", "one", "two"]])
def test_each_text_is_one_json_array(flags: list[str], llmopt: Any, made: Path) -> None:
    result = llmopt("run", made / "encoder", *flags)

    found = np.array([json.loads(line) for line in result.stdout.splitlines()])
    np.testing.assert_allclose(found, load(made / "encoder").embed(["one", "two"]), rtol=1e-6)


def test_texts_that_are_cut_are_told(llmopt: Any, made: Path) -> None:
    result = llmopt("run", made / "encoder", "--text", "far too long for this model")

    assert result.exit_code == 0
    assert result.stderr == "Warning: 1 of 1 texts were cut to 16 tokens\n"


def test_arrays_go_in_and_come_out(llmopt: Any, made: Path, tmp_path: Path) -> None:
    feeds = {"input_ids": np.array([[5, 6, 7]])}
    write_npz(tmp_path / "in.npz", feeds, force=False)

    line = ["--inputs", tmp_path / "in.npz", "-o", tmp_path / "out.npz"]
    result = llmopt("run", made / "encoder", *line)

    assert result.stdout == ""
    assert "sentence_embedding" in result.stderr
    found = read_npz(tmp_path / "out.npz")
    wanted = load(made / "encoder").run(feeds)
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def test_force_replaces_the_output(llmopt: Any, made: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", input_ids=np.array([[5]]))
    (tmp_path / "out.npz").touch()
    line = ["run", made / "encoder", "--inputs", tmp_path / "in.npz", "-o", tmp_path / "out.npz"]

    assert llmopt(*line).exit_code == 2
    assert llmopt(*line, "--force").exit_code == 0
    assert "sentence_embedding" in read_npz(tmp_path / "out.npz")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("", "nothing to run on"),
        ("--prompt a --text b", "--prompt and --text are mutually exclusive"),
        ("--prompt a b", "unexpected argument 'b'"),
        ("--text a --temperature 1", "--temperature has no effect with --text"),
        ("--text a --chat", "--chat has no effect"),
        ("--prompt a -o b", "--output has no effect with --prompt"),
        ("--inputs a.npz", "--inputs needs -o FILE.npz"),
        ("--inputs a.npz --seed 0 -o b", "--seed has no effect"),
        ("--inputs a.npz -o b", "a.npz: not found"),
        ("--prompt a --threads 0", "threads 0 is below 1"),
        ("--prompt a --max-new-tokens 0", "below 1"),
    ],
)
def test_a_request_that_cannot_be_is_refused(
    flags: str, says: str, llmopt: Any, made: Path
) -> None:
    result = llmopt("run", made / "shared", *flags.split())

    assert result.exit_code == 2
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_wrong_use_of_an_artifact_names_the_right_one(llmopt: Any, made: Path) -> None:
    assert "use --text" in llmopt("run", made / "encoder", "--prompt", "a").stderr
    assert "makes no embeddings" in llmopt("run", made / "shared", "--text", "a").stderr


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and no more"])
def test_what_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "in.npz").write_bytes(content)

    with pytest.raises(SourceError, match=r"not an \.npz file"):
        read_npz(tmp_path / "in.npz")


def test_a_single_array_has_no_name(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", np.ones(3))

    with pytest.raises(SourceError, match=r"numpy\.savez"):
        read_npz(tmp_path / "in.npy")


def test_objects_are_refused_with_advice_that_exists(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", a=np.array([{}], dtype=object))

    with pytest.raises(PickleRefusedError) as caught:
        read_npz(tmp_path / "in.npz")

    assert "numpy.savez" in str(caught.value)
    assert "--trust-pickle" not in str(caught.value)


def test_arrays_survive_a_file(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"a": np.arange(6).reshape(2, 3), "file": np.array([0.5], np.float32)}

    write_npz(tmp_path / "x", arrays, force=False)

    found = read_npz(tmp_path / "x")
    assert {name: array.tolist() for name, array in found.items()} == {
        "a": [[0, 1, 2], [3, 4, 5]],
        "file": [0.5],
    }
