"""Every way in which a user's request can fail: one line, the next step, nothing left behind."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from support.tiny_artifacts import TinyEncoder
from support.tiny_sources import Bomb, bigram_file, cut, gguf_file, llama_folder, torch_archive

from llmopt.cli import app

MARKER = "executed"


def llmopt(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="llmopt")


def everything(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, hidden ones included."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def check(result: Result, code: int, *says: str) -> None:
    """Check for one line of error that says all of this."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == code, result.stderr
    assert len(errors) == 1, result.stderr
    assert errors[0] == result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for text in says:
        assert text in errors[0]


def missing(_: Path) -> str:
    return "nothing.gguf"


def truncated_safetensors(root: Path) -> str:
    cut(llama_folder(root / "llama") / "model.safetensors")
    return "llama"


def truncated_gguf(root: Path) -> str:
    return cut(gguf_file(root / "model.gguf")).name


def garbage(name: str) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        (root / name).write_bytes(np.random.default_rng(0).bytes(5000))
        return name

    return make


def empty(name: str) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        (root / name).write_bytes(b"")
        return name

    return make


def without_weights(root: Path) -> str:
    (llama_folder(root / "llama") / "model.safetensors").unlink()
    return "llama"


def without_config(root: Path) -> str:
    (llama_folder(root / "llama") / "config.json").unlink()
    return "llama"


def broken_config(root: Path) -> str:
    (llama_folder(root / "llama") / "config.json").write_text("{", encoding="utf-8")
    return "llama"


def unknown_architecture(root: Path) -> str:
    llama_folder(root / "llama", model_type="fortune-teller", architectures=["FortuneTeller"])
    return "llama"


def missing_factory(root: Path) -> str:
    (root / "model.py").write_text("def build():\n    return 1\n", encoding="utf-8")
    return "model.py:make"


def failing_factory(root: Path) -> str:
    (root / "model.py").write_text("def make():\n    return 1 / 0\n", encoding="utf-8")
    return "model.py:make"


def text_file(root: Path) -> str:
    (root / "notes.txt").write_text("hello", encoding="utf-8")
    return "notes.txt"


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (missing, 2, ["nothing.gguf: not found", "Hugging Face folder"]),
        (truncated_safetensors, 1, ["model.safetensors", "truncated", "download"]),
        (truncated_gguf, 1, ["model.gguf", "truncated", "download"]),
        (garbage("model.gguf"), 1, ["model.gguf", "; "]),
        (garbage("model.onnx"), 1, ["model.onnx", "not an ONNX model", "export"]),
        (empty("model.onnx"), 1, ["model.onnx", "export"]),
        (empty("model.gguf"), 1, ["model.gguf", "; "]),
        (garbage("model.pt2"), 1, ["model.pt2", "again"]),
        (garbage("model.pt"), 1, ["model.pt", "again"]),
        (without_weights, 2, ["llama", "not found", ".safetensors"]),
        (without_config, 1, ["llama", "no config.json", "copy it"]),
        (broken_config, 1, ["config.json", "not JSON", "download"]),
        (unknown_architecture, 1, ["fortune-teller", "; "]),
        (missing_factory, 2, ["'make'", "build"]),
        (failing_factory, 1, ["make() failed", "ZeroDivisionError", "fix it"]),
        (text_file, 1, ["notes.txt", "not a kind of source", ".onnx"]),
    ],
)
def test_a_bad_source_is_one_line_with_the_next_step(
    make: Callable[[Path], str],
    code: int,
    says: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = make(tmp_path)
    before = everything(tmp_path)

    result = llmopt("compile", source, "--target", "cpu", "-o", "deep/out")

    check(result, code, *says)
    now = everything(tmp_path)
    assert {name: now[name] for name in now if "__pycache__" not in name} == before


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--target gpux", ["unknown target 'gpux'", "onnxruntime-cpu", "llmopt targets"]),
        ("--target cpu{level=3}", ["unknown option of target", "'level'"]),
        ("--target cpu --passes default,fuse-everything", ["unknown pass", "llmopt passes"]),
        ("--target cpu --passes canonicalize{x=1}", ["unknown option of pass canonicalize"]),
        ("--target cpu --quantize w5", ["unknown scheme 'w5'", "w4"]),
        ("--target cpu --quantize w4{width=3}", ["unknown option of scheme w4", "block"]),
        ("--target cpu --quantize w4 --block 33", ["block=33", "32"]),
        (
            "--target cpu --quantize w4{block=64} --block 32",
            ["--block 32 conflicts", "set the block there"],
        ),
        ("--target cpu --block 32", ["--quantize"]),
        ("--target cpu --quantize w4+kv8", ["'+'"]),
        ("--target cpu --quantize fp16", ["scheme for onnxruntime-cpu", "w8"]),
        ("--target cpu --quantize w6", ["scheme for onnxruntime-cpu", "w6 is for", "tvm-cpu"]),
        ("--target cpu --quantize w4{head=6}", ["onnxruntime-cpu", "6 bits", "head=8", "tvm-cpu"]),
        ("--target tensorrt --quantize w4{head=6}", ["6 bits", "w4 without head", "tvm-cpu"]),
        ("--target cpu --max-kl 0.1", ["--quantize"]),
        ("--target cpu --target onnxruntime-cpu", ["twice", "-o"]),
        ("--target cpu --require attention", ["KIND=all"]),
        ("--target cpu --require spelling=all", ["'spelling'", "attention"]),
        ("--target cpu --plugin nothing.py", ["nothing.py"]),
        ("--target cpu --task paint", ["'paint'", "generate", "--help"]),
        ("--target cpu --task embed", ["--task embed", "generate"]),
        ("--target cpu --bogus", ["'--bogus'", "--help"]),
    ],
)
def test_a_wrong_option_is_one_line_that_says_what_is_right(
    line: str, says: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    llama_folder(tmp_path / "llama")
    before = everything(tmp_path)

    result = llmopt("compile", "llama", *line.split(), "-o", "out")

    check(result, 2, *says)
    assert everything(tmp_path) == before


def test_an_output_that_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    llama_folder(tmp_path / "llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious", encoding="utf-8")
    before = everything(tmp_path)
    start = time.perf_counter()

    result = llmopt("compile", tmp_path / "llama", "--target", "cpu", "-o", tmp_path / "out")

    check(result, 2, "exists already", "--force", "-o")
    assert everything(tmp_path) == before
    assert time.perf_counter() - start < 30


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bigram_file(tmp_path / "bigram.onnx")
    TinyEncoder().write(tmp_path / "out")
    before = everything(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("onnx_ir.save", full)
    line = ["compile", tmp_path / "bigram.onnx", "--target", "cpu", "-o", tmp_path / "out"]
    result = llmopt(*line, "--force")

    check(result, 1, "out: cannot be written", "No space left", "free space")
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("compile bigram.onnx --target cpu", "bigram.onnxruntime-cpu"),
        ("opt bigram.onnx --passes canonicalize -o deep/out.onnx", "deep/out.onnx"),
    ],
)
def test_a_file_that_may_not_grow_leaves_nothing(line: str, what: str, tmp_path: Path) -> None:
    bigram_file(tmp_path / "bigram.onnx")
    before = everything(tmp_path)

    done = subprocess.run(
        [sys.executable, "-m", "llmopt", *line.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900)),
    )

    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert f"{what}: cannot be written" in last
    assert "Traceback" not in done.stderr
    assert everything(tmp_path) == before


def heed_ctrl_c() -> None:
    """Undo what shells do to commands in the background, whose children would not hear SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(process: subprocess.Popen[bytes], when: str) -> tuple[int, str]:
    """Send SIGINT once stderr says ``when``; return the exit code and all of stderr."""
    assert process.stderr is not None
    said = b""
    while when.encode() not in said:
        piece = os.read(process.stderr.fileno(), 4096)
        assert piece, said.decode()
        said += piece
    time.sleep(0.3)  # into the stage
    process.send_signal(signal.SIGINT)
    said += process.stderr.read()
    return process.wait(60), said.decode()


@pytest.mark.parametrize("stage", ["starting", "tracing"])
def test_ctrl_c_ends_quietly_and_leaves_what_was_there(stage: str, tmp_path: Path) -> None:
    llama_folder(tmp_path / "llama")
    TinyEncoder().write(tmp_path / "out")
    before = everything(tmp_path)

    line = ["compile", "llama", "--target", "cpu", "-o", "out", "--force"]
    with subprocess.Popen(
        [sys.executable, "-m", "llmopt", *line],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heed_ctrl_c,  # noqa: PLW1509 - no thread of ours runs
    ) as process:
        code, said = interrupt(process, stage)

    assert code == 130, said
    assert said.splitlines()[-1] == "interrupted; nothing was written"
    assert "Traceback" not in said
    assert "Error" not in said
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("exec('raise KeyboardInterrupt')", id="exec"),
        pytest.param(
            "type('Finalized', (), {'__del__': lambda _: raised()})(); time.sleep(60)",
            id="finalizer",
        ),
    ],
)
def test_ctrl_c_where_python_loses_it_has_the_same_exit_code(where: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import time\n"
        "import llmopt.cli.catalog\n"
        "def raised():\n"
        "    raise KeyboardInterrupt\n"
        "def interrupted(*_, **__):\n"
        f"    {where}\n"
        "llmopt.cli.catalog.targets_command.callback = interrupted\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "llmopt", "targets"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=heed_ctrl_c,
    )

    assert result.stderr == "interrupted; nothing was written\n"
    assert result.returncode == 130


@pytest.mark.parametrize("where", ["onnx_ir.save", "llmopt.compiler.compilation.verify"])
def test_ctrl_c_while_the_artifact_is_written_leaves_what_was_there(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bigram_file(tmp_path / "bigram.onnx")
    TinyEncoder().write(tmp_path / "out")
    before = everything(tmp_path)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    line = ["compile", tmp_path / "bigram.onnx", "--target", "cpu", "-o", tmp_path / "out"]
    result = llmopt(*line, "--force")

    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted; nothing was written"
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert everything(tmp_path) == before


def plain_pickle(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content))
    return path


def pt_bomb(root: Path, bomb: Bomb) -> list[object]:
    torch_archive(root / "model.pt", bomb)
    return ["compile", "model.pt", "--target", "cpu"]


def old_pt_bomb(root: Path, bomb: Bomb) -> list[object]:
    plain_pickle(root / "model.pth", bomb)
    return ["compile", "model.pth", "--target", "cpu"]


def pt2_bomb(root: Path, bomb: Bomb) -> list[object]:
    torch_archive(root / "model.pt2", bomb)
    return ["compile", "model.pt2", "--target", "cpu"]


def bin_bomb(root: Path, bomb: Bomb) -> list[object]:
    (llama_folder(root / "llama") / "model.safetensors").unlink()
    torch_archive(root / "llama" / "pytorch_model.bin", {"model.norm.weight": bomb})
    return ["compile", "llama", "--target", "cpu"]


def inspected_bin_bomb(root: Path, bomb: Bomb) -> list[object]:
    bin_bomb(root, bomb)
    return ["inspect", "llama"]


def npz_bomb(root: Path, bomb: Bomb) -> list[object]:
    TinyEncoder().write(root / "encoder")
    np.savez(root / "in.npz", input_ids=np.array([bomb], dtype=object))
    return ["run", "encoder", "--inputs", "in.npz", "-o", "out.npz"]


def pickle_named_npz(root: Path, bomb: Bomb) -> list[object]:
    TinyEncoder().write(root / "encoder")
    plain_pickle(root / "in.npz", bomb)
    return ["run", "encoder", "--inputs", "in.npz", "-o", "out.npz"]


def example_bomb(root: Path, bomb: Bomb) -> list[object]:
    text = "from torch import nn\n\ndef make():\n    return nn.Linear(3, 3)\n"
    (root / "model.py").write_text(text, encoding="utf-8")
    np.savez(root / "in.npz", input=np.array([bomb], dtype=object))
    return ["compile", "model.py:make", "--target", "cpu", "--example-inputs", "in.npz"]


@pytest.mark.parametrize(
    "make",
    [
        pt_bomb,
        old_pt_bomb,
        bin_bomb,
        inspected_bin_bomb,
        npz_bomb,
        pickle_named_npz,
        example_bomb,
    ],
)
def test_a_malicious_pickle_is_refused_and_does_not_execute(
    make: Callable[[Path, Bomb], list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = make(tmp_path, Bomb(tmp_path / MARKER))
    before = everything(tmp_path)

    result = llmopt(*line)

    check(result, 2, "refused", "executes code")
    now = everything(tmp_path)
    assert {name: now[name] for name in now if "__pycache__" not in name} == before


def test_a_malicious_pt2_does_not_execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = pt2_bomb(tmp_path, Bomb(tmp_path / MARKER))

    result = llmopt(*line)

    assert result.exit_code in {1, 2}
    check(result, result.exit_code, "model.pt2")
    assert not (tmp_path / MARKER).exists()


def test_the_bomb_would_go_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / MARKER)))  # noqa: S301 - our own

    assert (tmp_path / MARKER).exists()


def test_a_damaged_artifact_is_one_line(tmp_path: Path) -> None:
    TinyEncoder().write(tmp_path / "encoder")
    cut(tmp_path / "encoder" / "model.onnx")

    for line in (["run", "--text", "a"], ["inspect"], ["bench"]):
        check(llmopt(line[0], tmp_path / "encoder", *line[1:]), 1, "model.onnx", "compile it again")


def test_no_artifact_is_one_line(tmp_path: Path) -> None:
    for line in (["run", "--text", "a"], ["bench"], ["evaluate", "--reference", "x"]):
        check(llmopt(line[0], tmp_path / "none", *line[1:]), 2, "not found", "llmopt compile")


def test_a_missing_runtime_is_exit_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TinyEncoder().write(tmp_path / "encoder")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    result = llmopt("run", tmp_path / "encoder", "--text", "a")

    check(result, 3, "onnxruntime", "pip install")


def test_any_flag_is_better_than_losing_work(tmp_path: Path) -> None:
    TinyEncoder().write(tmp_path / "encoder")
    np.savez(tmp_path / "in.npz", input_ids=np.array([[1, 2]]))
    (tmp_path / "out.npz").write_text("precious", encoding="utf-8")

    line: list[Any] = ["--inputs", tmp_path / "in.npz", "-o", tmp_path / "out.npz"]
    check(llmopt("run", tmp_path / "encoder", *line), 2, "exists already")
    assert (tmp_path / "out.npz").read_text(encoding="utf-8") == "precious"
