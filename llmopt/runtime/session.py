"""The one place that touches onnxruntime: opening a model, running it, binding buffers to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llmopt.bundle.manifest import Manifest, Port
from llmopt.errors import ArtifactError, BackendUnavailableError, LlmoptError
from llmopt.runtime.cores import usable_cores

Array = npt.NDArray[Any]

PROVIDERS: Final[Mapping[str, str]] = {
    "onnxruntime-cpu": "CPUExecutionProvider",
    "onnxruntime-arm64": "CPUExecutionProvider",
}
_INSTALL: Final = "it is not installed; pip install 'llmopt[runtime]'"
_ERRORS_ONLY: Final = 3


class Session:
    """An opened model and what its manifest says of its inputs and outputs.

    Args:
        folder: The artifact.
        manifest: Its manifest.
        threads: Threads inside one operator; None for as many as the process may use.

    Raises:
        BackendUnavailableError: onnxruntime or the provider is not here.
        ArtifactError: The model file cannot be opened, or is not what the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None = None) -> None:
        self.manifest = manifest
        self.threads = threads or usable_cores()
        self.inputs = {port.name: port for port in manifest.signature.inputs}
        self.outputs = {port.name: port for port in manifest.signature.outputs}
        self._ort = _import_onnxruntime()
        self._session = self._open(folder)
        self._check_names(folder)

    def find(self, role: str) -> Port | None:
        """Return the first input or output with this role, if there is one."""
        ports = [*self.inputs.values(), *self.outputs.values()]
        return next((port for port in ports if port.role == role), None)

    def need(self, role: str) -> Port:
        """Return the first input or output with this role.

        Raises:
            LlmoptError: The model has none.
        """
        port = self.find(role)
        if port is None:
            task = self.manifest.task
            raise LlmoptError(f"this artifact (task {task!r}) has no {role!r} input or output")
        return port

    def layered(self, role: str) -> list[Port]:
        """Return the inputs or outputs with this role, by layer."""
        ports = [*self.inputs.values(), *self.outputs.values()]
        return sorted((p for p in ports if p.role == role), key=lambda port: port.layer or 0)

    def run(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Return the outputs by name; ``names`` picks some of them.

        Raises:
            LlmoptError: onnxruntime could not run it.
        """
        wanted = list(names or self.outputs)
        try:
            results = self._session.run(wanted, dict(feeds))
        except self._failures as error:
            raise self._failed(error) from error
        return dict(zip(wanted, results, strict=True))

    def run_values(self, feeds: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
        """Return outputs that stay where they are: values to be fed to the next call."""
        try:
            values: list[Any] = self._session.run_with_ort_values(list(names), dict(feeds))
        except self._failures as error:
            raise self._failed(error) from error
        return values

    def value(self, array: Array) -> Any:
        """Return ``array`` as a value of the backend, sharing its memory."""
        return self._ort.OrtValue.ortvalue_from_numpy(array)

    def bind(self) -> Binding:
        """Return an empty set of buffers to run with."""
        return Binding(self)

    @property
    def _failures(self) -> tuple[type[Exception], ...]:
        state = self._ort.capi.onnxruntime_pybind11_state
        names = ("Fail", "InvalidArgument", "NotImplemented", "RuntimeException", "EPFail")
        # Bound runs raise plain RuntimeError for all of these.
        return (RuntimeError, *(getattr(state, name) for name in names))

    def _failed(self, error: Exception) -> LlmoptError:
        return LlmoptError(f"onnxruntime could not run the model: {_first_line(error)}")

    def _open(self, folder: Path) -> Any:
        provider = self._provider(folder)
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        state = self._ort.capi.onnxruntime_pybind11_state
        broken = (*self._failures, state.InvalidProtobuf, state.InvalidGraph, state.NoSuchFile)
        path = folder / self.manifest.entry
        try:
            session = self._ort.InferenceSession(path, options, providers=[provider])
        except broken as error:
            raise ArtifactError(path, self._why_not_opened(error)) from error
        if session.get_providers()[0] != provider:  # it falls back without a word
            raise BackendUnavailableError("onnxruntime", f"{provider} did not start")
        return session

    def _provider(self, folder: Path) -> str:
        name = self.manifest.target.partition("{")[0]
        provider = PROVIDERS.get(name)
        if provider is None:
            known = ", ".join(PROVIDERS)
            raise BackendUnavailableError(name, f"{folder} is built for it, this runs: {known}")
        available = self._ort.get_available_providers()
        if provider not in available:
            raise BackendUnavailableError(name, f"onnxruntime has no {provider}, only {available}")
        return provider

    def _why_not_opened(self, error: Exception) -> str:
        made = self.manifest.versions.get("onnxruntime")
        here = self._ort.__version__
        tail = "" if made in {None, here} else f" (made with onnxruntime {made}, this is {here})"
        return f"onnxruntime cannot open it: {_first_line(error)}{tail}"

    def _check_names(self, folder: Path) -> None:
        session = self._session
        inputs = [*session.get_inputs(), *session.get_overridable_initializers()]
        there = {node.name for node in [*inputs, *session.get_outputs()]}
        missing = [name for name in (*self.inputs, *self.outputs) if name not in there]
        if missing:
            entry = folder / self.manifest.entry
            raise ArtifactError(entry, f"the manifest names {missing[0]!r}, the model has no such")


class Binding:
    """Buffers that a model reads and writes in place, kept from one run to the next."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._binding = session._session.io_binding()  # noqa: SLF001 - the two are one seam
        self._kept: dict[str, Array] = {}
        self._bound: list[str] = []  # outputs, in the order that onnxruntime gives them back

    def feed(self, name: str, array: Array) -> None:
        """Read input ``name`` from ``array``, now and until it is fed another."""
        self._kept[name] = array
        self._binding.bind_ortvalue_input(name, self._session.value(array))

    def fetch(self, name: str, array: Array) -> None:
        """Write output ``name`` into ``array``, which has exactly its shape."""
        self._kept[name] = array
        self._remember(name)
        self._binding.bind_ortvalue_output(name, self._session.value(array))

    def allocate(self, name: str) -> None:
        """Let onnxruntime allocate output ``name``: what a run gives may differ from its shape."""
        self._kept.pop(name, None)
        self._remember(name)
        self._binding.bind_output(name)

    def allocated(self, name: str) -> Array:
        """Return a copy of output ``name`` after a run."""
        value = self._binding.get_outputs()[self._bound.index(name)]
        return np.array(value.numpy())

    def _remember(self, name: str) -> None:
        if name not in self._bound:
            self._bound.append(name)

    def share(self, past: str, present: str, array: Array) -> None:
        """Let input ``past`` and output ``present`` be the same memory."""
        value = self._session.value(array)
        self._kept[past] = array
        self._remember(present)
        self._binding.bind_ortvalue_input(past, value)
        self._binding.bind_ortvalue_output(present, value)

    def run(self) -> None:
        """Run the model once on these buffers.

        Raises:
            LlmoptError: onnxruntime could not run it.
        """
        session = self._session
        try:
            session._session.run_with_iobinding(self._binding)  # noqa: SLF001 - as above
        except session._failures as error:  # noqa: SLF001 - as above
            raise session._failed(error) from error  # noqa: SLF001 - as above


def aligned_zeros(shape: Sequence[int], dtype: str) -> Array:
    """Return zeros that start at a multiple of 64 bytes, as wide vector loads like them."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailableError("onnxruntime", _INSTALL) from error
    return onnxruntime


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
