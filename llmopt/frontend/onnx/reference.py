"""References of ONNX files: ONNX Runtime without any of its optimizations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.errors import BackendUnavailableError, SourceError
from llmopt.frontend.reference import Transform
from llmopt.interface.arrays import Arrays


class OnnxReference:
    """An imported ONNX file.

    Args:
        path: The file.
        inputs: The names of its inputs.
        outputs: Names of the Program's outputs, in order.
        weights: Reader of each weight, by its name in the file.
    """

    def __init__(
        self,
        path: Path,
        inputs: Sequence[str],
        outputs: Sequence[str],
        weights: Mapping[str, Callable[[], npt.NDArray[Any]]],
    ) -> None:
        self._path = path
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._weights = weights

    def run(
        self, batches: Sequence[Arrays], transform: Transform | None = None
    ) -> Iterator[Arrays]:
        """Yield the outputs of each batch."""
        replaced = self._replaced(transform)  # the session does not own them: keep them alive
        session = self._session(replaced)
        for batch in batches:
            results = session.run(None, {name: batch[name] for name in self._inputs})
            yield dict(zip(self._outputs, results, strict=True))

    def _replaced(self, transform: Transform | None) -> dict[str, Any]:
        """Return each weight, transformed, as a value of ONNX Runtime."""
        if transform is None:
            return {}
        from onnxruntime import OrtValue

        return {
            name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(transform(name, read())))
            for name, read in self._weights.items()
        }

    def _session(self, replaced: Mapping[str, Any]) -> Any:
        if find_spec("onnxruntime") is None:
            need = "it runs the ONNX source for verification: pip install 'llmopt[runtime]'"
            raise BackendUnavailableError("onnxruntime", need)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        for name, value in replaced.items():
            options.add_initializer(name, value)
        try:
            return onnxruntime.InferenceSession(
                str(self._path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its classes share no narrower base
            line = str(error).partition("\n")[0][:200]
            raise SourceError(
                self._path, f"onnxruntime refuses it: {line}", "export it again"
            ) from error
