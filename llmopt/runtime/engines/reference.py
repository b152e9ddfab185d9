"""The Program itself, run operator by operator: the one engine that needs the compiler's packages.

It is an oracle for a desk and not for a device. The evaluator is found by its name when an artifact
is opened, so that what a device installs does not grow.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from typing_extensions import override

from llmopt.artifact.manifest import Manifest
from llmopt.errors import BackendUnavailableError
from llmopt.interface.arrays import Array
from llmopt.runtime.session import Session
from llmopt.runtime.steps import NoCache, Step, Stepper, cache_pairs, cache_shape

_EVALUATOR: Final = "llmopt.ir.evaluator"
_INSTALL: Final = "it needs onnx and onnx-ir; pip install 'llmopt[compile]'"


class ReferenceSession(Session):
    """An artifact opened by the evaluator.

    Args:
        folder: The artifact.
        manifest: Its manifest.
        threads: Not heeded: products are numpy's, which takes as many as it finds.

    Raises:
        BackendUnavailableError: The evaluator's packages are not installed.
        ArtifactError: The model file cannot be opened.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None = None) -> None:
        super().__init__(manifest, threads)
        self._evaluator = _import_evaluator().open_model(folder / manifest.entry)

    @override
    def run(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        found: dict[str, Array] = self._evaluator.run(feeds, names or list(self.outputs))
        return found

    @override
    def stepper(self, batch: int, capacity: int) -> Stepper:
        return CopiedCache(self, batch) if self.manifest.signature.has_cache else NoCache(self)


class CopiedCache:
    """Present is past and the new tokens, other arrays at each step.

    Args:
        session: The model.
        batch: B.
    """

    def __init__(self, session: Session, batch: int) -> None:
        self._session = session
        self._logits = session.need("logits").name
        self._presents = {past.name: present.name for past, present in cache_pairs(session)}
        self._cache: dict[str, Array] = {
            past.name: np.zeros(cache_shape(past, batch, 0), past.dtype)
            for past, _ in cache_pairs(session)
        }

    def run(self, step: Step) -> Array:
        """Return logits [B, K, V]."""
        feeds = {**self._cache, **step.feeds(self._session)}
        found = self._session.run(feeds, [self._logits, *self._presents.values()])
        self._cache = {past: found[present] for past, present in self._presents.items()}
        return found[self._logits]

    def reorder(self, rows: Sequence[int], length: int) -> None:  # noqa: ARG002 - all of it
        """Let row i go on from what row ``rows[i]`` remembers."""
        self._cache = {name: array[list(rows)] for name, array in self._cache.items()}


def _import_evaluator() -> Any:
    try:
        return importlib.import_module(_EVALUATOR)
    except ImportError as error:
        raise BackendUnavailableError("reference", _INSTALL) from error
