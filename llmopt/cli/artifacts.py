"""Paths of artifacts on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from llmopt.errors import SourceNotFoundError

MANIFEST: Final = "manifest.json"
_HINT: Final = "give an artifact, a directory that `llmopt compile` wrote"


def require_there(*paths: Path) -> None:
    """Raise unless something is at each path; what it is, is found out when it is read.

    Raises:
        SourceNotFoundError: Nothing is at one of them.
    """
    for path in paths:
        if not path.exists():
            raise SourceNotFoundError(path, _HINT)


def is_artifact(path: Path) -> bool:
    """Whether ``path`` is an artifact, perhaps a damaged one, rather than a source."""
    return (path / MANIFEST).is_file()
