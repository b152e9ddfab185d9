"""The example in C++ writes the tokens that the runner writes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest
from edge.arm64 import ROOT, MissingError
from edge.headers import headers
from support.tiny_artifacts import TinyDecoder

import llmopt

pytestmark = pytest.mark.slow

SOURCE = ROOT / "docs" / "examples" / "cpp" / "generate.cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, compiled as its page says, or a skip that says what that needs."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    try:
        include = headers()
    except MissingError as error:
        pytest.skip(f"needs the headers of ONNX Runtime: {error}")
    place = tmp_path_factory.mktemp("cpp")
    [library] = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.1.*")
    (place / "libonnxruntime.so.1").symlink_to(library)  # by the name that programs look for
    made = place / "generate"
    strict = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    linked = [str(place / "libonnxruntime.so.1"), f"-Wl,-rpath,{place}"]
    subprocess.run(
        [compiler, *strict, f"-I{include}", str(SOURCE), "-o", str(made), *linked], check=True
    )
    return made


def test_it_writes_the_tokens_of_the_runner(program: Path, tmp_path: Path) -> None:
    artifact = TinyDecoder("shared").write(tmp_path / "tiny")
    prompt = list(b"Hello, world")

    done = subprocess.run(
        [program, artifact / "model.onnx", "20", *map(str, prompt)],
        capture_output=True,
        text=True,
        check=True,
    )

    [wanted] = llmopt.load(artifact).generate_ids([prompt], max_new_tokens=20, stop_tokens=())
    assert [int(word) for word in done.stdout.split()] == wanted
    assert done.stderr == ""


def test_what_it_cannot_do_it_says(program: Path, tmp_path: Path) -> None:
    usage = subprocess.run([program], capture_output=True, text=True, check=False)
    absent = subprocess.run(
        [program, tmp_path / "none.onnx", "1", "1"], capture_output=True, text=True, check=False
    )

    assert (usage.returncode, absent.returncode) == (2, 1)
    assert "usage: " in usage.stderr
    assert "none.onnx" in absent.stderr


def test_it_is_short() -> None:
    assert len(SOURCE.read_text().splitlines()) <= 150
