"""The arm64 target writes what the x86-64 target writes, and says where it was proven."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.programs import program
from support.schemes import scheme_of
from support.tiny_decoder import tiny_decoder

from llmopt.backends import find_backend
from llmopt.backends.base import Demand
from llmopt.backends.onnxruntime import OnnxRuntimeArm64
from llmopt.passes.pipeline import Pipeline
from llmopt.runtime.session import ENGINES


@pytest.mark.parametrize("scheme", [None, "w4"])
def test_the_files_are_those_of_x86(scheme: str | None, tmp_path: Path) -> None:
    contents = []
    for target in ("edge", "cpu"):
        backend = find_backend(target)
        folder = tmp_path / target
        folder.mkdir()
        low = Pipeline(backend.passes(scheme_of(scheme))).run(tiny_decoder(keep=True))
        backend.write(low, folder, Demand())
        contents.append({file.name: file.read_bytes() for file in folder.iterdir()})

    assert contents[0] == contents[1]
    assert "model.onnx" in contents[0]


def test_it_says_where_it_was_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert find_backend("edge").proven_by == "the same graph on x86_64"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert find_backend("edge").proven_by == ""
    assert find_backend("edge") == OnnxRuntimeArm64()
    assert find_backend("edge").available() == find_backend("cpu").available()
    assert ENGINES["onnxruntime-arm64"] == ENGINES["onnxruntime-cpu"]


def test_what_it_cannot_run_is_what_x86_cannot() -> None:
    made = program("main (float[B,4] x) => (float[B,4] y) { [odd] y = Relu (x) }")
    next(iter(made.graph)).op_type = "NoSuchOperator"

    assert find_backend("edge").check(made) == find_backend("cpu").check(made)
