"""The Program itself, run operator by operator: the one engine that needs the compiler's packages.

It is an oracle for a desk and not for a device. The evaluator is found by its name when an artifact
is opened, so that what a device installs does not grow.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from typing_extensions import override

from llmopt.artifact.manifest import Manifest
from llmopt.errors import BackendUnavailableError
from llmopt.interface.arrays import Array
from llmopt.interface.stepping import Stepper
from llmopt.runtime.session import Session

_EVALUATOR: Final = "llmopt.ir.evaluator"
_INSTALL: Final = "it needs onnx and onnx-ir; pip install 'llmopt[compile]'"


class ReferenceSession(Session):
    """An artifact opened by the evaluator.

    Args:
        folder: The artifact.
        manifest: Manifest of the artifact.
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
        return self.plain_stepper(batch, capacity)


def _import_evaluator() -> Any:
    try:
        return importlib.import_module(_EVALUATOR)
    except ImportError as error:
        raise BackendUnavailableError("reference", _INSTALL) from error
