"""Running the command line in this process, and artifacts to run it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.tiny_artifacts import TinyDecoder, TinyEncoder
from support.tiny_sources import bigram_file

from llmopt.cli import app

Llmopt = Callable[..., Result]


@pytest.fixture(scope="session")
def llmopt() -> Llmopt:
    """Run ``llmopt`` with these arguments."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, list(map(str, arguments)), prog_name="llmopt")

    return run


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the artifacts ``shared``, ``concat`` and ``encoder``."""
    root = tmp_path_factory.mktemp("artifacts")
    TinyDecoder("shared").write(root / "shared")
    TinyDecoder("concat").write(root / "concat")
    TinyEncoder().write(root / "encoder")
    return root


@pytest.fixture(scope="session")
def bigram(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file, ``bigram.onnx``, that compiles within a second."""
    return bigram_file(tmp_path_factory.mktemp("sources") / "bigram.onnx")
