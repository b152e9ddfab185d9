"""Artifacts that several tests read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_artifacts import TinyDecoder, TinyEncoder

from llmopt.runtime import Runner, load


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one artifact for each kind of cache, and an encoder."""
    root = tmp_path_factory.mktemp("artifacts")
    TinyDecoder("shared").write(root / "shared")
    TinyDecoder("concat").write(root / "concat")
    TinyDecoder("none").write(root / "none")
    TinyEncoder().write(root / "encoder")
    return root


@pytest.fixture(scope="session", params=["shared", "concat", "none"])
def decoder(request: pytest.FixtureRequest, folders: Path) -> Runner:
    """A runner of the tiny decoder, for each kind of cache."""
    return load(folders / request.param, threads=1)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the ``llmopt`` logger says."""
    with caplog.at_level(logging.INFO, logger="llmopt"):
        yield caplog
