"""The tiny artifacts of the runtime's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_artifacts import TinyDecoder, TinyEncoder


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two decoders and an encoder."""
    root = tmp_path_factory.mktemp("benchmarked")
    TinyDecoder("shared").write(root / "shared")
    TinyDecoder("concat").write(root / "concat")
    TinyEncoder().write(root / "encoder")
    return root
