"""Artifacts run by onnxruntime: opening a model, running it, binding buffers to it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from typing_extensions import override

from llmopt.artifact.manifest import Manifest
from llmopt.errors import ArtifactError, BackendUnavailableError, LlmoptError
from llmopt.interface.arrays import Array
from llmopt.interface.signature import Role
from llmopt.interface.stepping import Step, Stepper
from llmopt.runtime.engines.onnxruntime_device import OnnxRuntimeCache
from llmopt.runtime.engines.onnxruntime_profile import read_profile
from llmopt.runtime.engines.providers import CPU, provider_of, start
from llmopt.runtime.huge_pages import large_pages
from llmopt.runtime.session import Session, TimedRun, aligned_zeros, zeros_together

_INSTALL: Final = "it is not installed; pip install 'llmopt[runtime]'"
_ERRORS_ONLY: Final = 3
_BFLOAT16: Final = 16  # what ONNX calls it


class OnnxRuntimeSession(Session):
    """An artifact opened by onnxruntime.

    Args:
        folder: The artifact.
        manifest: Manifest of the artifact.
        threads: Threads inside one operator; None for as many as the process may use.

    Raises:
        BackendUnavailableError: onnxruntime or the provider is not here.
        ArtifactError: The model file cannot be opened, or is not what the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None = None) -> None:
        super().__init__(manifest, threads)
        self._ort = _import_onnxruntime()
        self.place = provider_of(manifest.target, manifest.requires, self.threads)
        self._folder = folder
        with large_pages():
            self._session = self._open(folder)
        self._check_names(folder)

    @override
    def stepper(self, batch: int, capacity: int) -> Stepper:
        match self.manifest.model.cache:
            case "shared" if self.place.device == "cpu":
                return SharedCache(self, batch, capacity)
            case "shared":
                return OnnxRuntimeCache(self, batch, capacity)
            case "concat":
                return ConcatCache(self, batch)
            case "none":
                return self.plain_stepper(batch, capacity)

    @property
    @override
    def profiles(self) -> bool:
        # Another provider's node may be the whole model, and a GPU's only the start of its kernel.
        return self.place.provider == CPU

    @override
    def profiled(self, work: Callable[[], None]) -> list[TimedRun]:
        usual = self._session
        with tempfile.TemporaryDirectory(prefix="llmopt-profile-") as place:
            self._session = self._open(self._folder, profile=Path(place, "run"))
            try:
                work()
                return read_profile(Path(self._session.end_profiling()))
            finally:
                self._session = usual

    @override
    def run(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        wanted = list(names or self.outputs)
        try:
            results = self._session.run(wanted, dict(feeds), self.run_options())
        except self._failures as error:
            raise self._failed(error) from error
        return dict(zip(wanted, results, strict=True))

    def run_values(self, feeds: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
        """Return outputs that stay where they are: values to be fed to the next call."""
        try:
            values: list[Any] = self._session.run_with_ort_values(
                list(names), dict(feeds), self.run_options()
            )
        except self._failures as error:
            raise self._failed(error) from error
        return values

    def value(self, array: Array) -> Any:
        """Return ``array`` as a value of the backend, sharing its memory."""
        return self._ort.OrtValue.ortvalue_from_numpy(array)

    def buffer(self, shape: Sequence[int], dtype: str) -> Any:
        """Return zeros where the model runs; of bfloat16, which numpy lacks, whatever is there."""
        values, device = self._ort.OrtValue, self.place.device
        if dtype == "bfloat16":
            return values.ortvalue_from_shape_and_type(list(shape), _BFLOAT16, device)
        return values.ortvalue_from_numpy(np.zeros(shape, dtype), device)

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """Return a value of no elements, on the host."""
        if dtype == "bfloat16":
            zeros = np.zeros(shape, np.uint16)
            return self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(zeros, _BFLOAT16)
        return self.value(np.zeros(shape, dtype))

    def run_options(self, graph: int = -1) -> Any:
        """Return how to run once: as captured graph ``graph``, or -1 for uncaptured."""
        if not self.place.captures:
            return None
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        return options

    def release(self, graph: int) -> None:
        """Forget captured graph number ``graph`` and free what it holds."""
        if hasattr(self._session, "release_captured_graph"):
            self._session.release_captured_graph(graph)

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

    def _open(self, folder: Path, profile: Path | None = None) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        state = self._ort.capi.onnxruntime_pybind11_state
        broken = (*self._failures, state.InvalidProtobuf, state.InvalidGraph, state.NoSuchFile)
        path = folder / self.manifest.entry
        try:
            return start(self._ort, path, options, self.place)
        except broken as error:
            raise ArtifactError(path, self._why_not_opened(error)) from error

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
            raise ArtifactError(
                entry,
                f"the manifest lists {missing[0]!r}, but the model has no such input or output",
            )


class Binding:
    """Buffers that a model reads and writes in place, kept from one run to the next."""

    def __init__(self, session: OnnxRuntimeSession) -> None:
        self._session = session
        self._binding = session._session.io_binding()  # noqa: SLF001 - the two are one seam
        self._kept: dict[str, Any] = {}
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

    def feed_value(self, name: str, value: Any) -> None:
        """Read input ``name`` from a value of the backend."""
        self._kept[name] = value
        self._binding.bind_ortvalue_input(name, value)

    def fetch_value(self, name: str, value: Any) -> None:
        """Write output ``name`` into a value of the backend, which has exactly its shape."""
        self._kept[name] = value
        self._remember(name)
        self._binding.bind_ortvalue_output(name, value)

    def share(self, past: str, present: str, value: Any) -> None:
        """Let input ``past`` and output ``present`` be the same memory."""
        self._kept[past] = value
        self._remember(present)
        self._binding.bind_ortvalue_input(past, value)
        self._binding.bind_ortvalue_output(present, value)

    def run(self, options: Any = None) -> None:
        """Run the model once on these buffers.

        Args:
            options: Options of this run.

        Raises:
            LlmoptError: onnxruntime could not run it.
        """
        session = self._session
        try:
            session._session.run_with_iobinding(self._binding, options)  # noqa: SLF001 - as above
        except session._failures as error:  # noqa: SLF001 - as above
            raise session._failed(error) from error  # noqa: SLF001 - as above


class SharedCache:
    """Past and present are one buffer per layer, which the model writes in place.

    Args:
        session: The model.
        batch: B.
        capacity: Most tokens a row can come to.
    """

    def __init__(self, session: OnnxRuntimeSession, batch: int, capacity: int) -> None:
        self._session = session
        self._binding = session.bind()
        self._logits = session.need(Role.LOGITS)
        self._mask_memory = np.ones(batch * capacity, np.int64)
        self._fast: _OneToken | None = None
        pairs = session.signature.cache_pairs()
        shapes = [past.cache_shape(batch, capacity) for past, _ in pairs]
        caches = zeros_together(shapes, [past.dtype for past, _ in pairs])
        self._caches = caches
        for (past, present), cache in zip(pairs, caches, strict=True):
            self._binding.share(past.name, present.name, session.value(cache))

    def run(self, step: Step) -> Array:
        """Return logits [B, K, V]; the array is overwritten by the next run."""
        if step.tokens.shape[1] == 1:
            return self._run_one(step)
        self._fast = None
        self._bind(step.feeds(self._session.signature))
        if step.every and self._session.find(Role.LOGITS_TO_KEEP) is not None:
            # the artifact declares logits of one token, and a bound output must be as declared
            self._binding.allocate(self._logits.name)
            self._binding.run()
            return self._binding.allocated(self._logits.name)
        logits = self._fetch_logits(step)
        self._binding.run()
        return logits

    def reorder(self, rows: Sequence[int], length: int) -> None:
        """Let row i go on from what row ``rows[i]`` remembers."""
        for cache in self._caches:
            cache[:, :, :length] = cache[list(rows), :, :length]

    def _run_one(self, step: Step) -> Array:
        """Run a step of one token: buffers stay bound, and only the growing mask is bound anew."""
        mask = self._mask_memory[: step.mask.size].reshape(step.mask.shape)
        mask[...] = step.mask
        if self._fast is None:
            # These are written to below, so they must not be the caller's.
            signature = self._session.signature
            feeds = {name: array.copy() for name, array in step.feeds(signature).items()}
            self._bind(feeds)
            entering = feeds[self._session.need(step.entering[0]).name]
            self._fast = _OneToken.of(self._session, feeds, entering, self._fetch_logits(step))
        self._fast.entering[...] = step.entering[1]
        if self._fast.positions is not None:
            self._fast.positions[...] = step.positions
        self._binding.feed(self._fast.mask_name, mask)
        self._binding.run()
        return self._fast.logits

    def _bind(self, feeds: dict[str, Array]) -> None:
        for name, array in feeds.items():
            self._binding.feed(name, array)

    def _fetch_logits(self, step: Step) -> Array:
        batch, new = step.tokens.shape
        free = new if step.every or self._session.find(Role.LOGITS_TO_KEEP) is None else 1
        _, kept, width = self._logits.shape
        vocabulary = self._session.manifest.model.vocabulary
        shape = (
            batch,
            kept if isinstance(kept, int) else free,
            width if isinstance(width, int) else vocabulary,
        )
        logits = aligned_zeros(shape, self._logits.dtype)
        self._binding.fetch(self._logits.name, logits)
        return logits


@dataclass(frozen=True)
class _OneToken:
    """The buffers of a step of one token."""

    entering: Array
    positions: Array | None
    mask_name: str
    logits: Array

    @classmethod
    def of(
        cls,
        session: OnnxRuntimeSession,
        feeds: dict[str, Array],
        entering: Array,
        logits: Array,
    ) -> _OneToken:
        positions = session.find(Role.POSITIONS)
        return cls(
            entering=entering,
            positions=None if positions is None else feeds[positions.name],
            # Without a mask the model could not tell how much of the buffer is in use.
            mask_name=session.need(Role.MASK).name,
            logits=logits,
        )


class ConcatCache:
    """Present is past and the new tokens, another tensor at each step.

    Args:
        session: The model.
        batch: B.
    """

    def __init__(self, session: OnnxRuntimeSession, batch: int) -> None:
        self._session = session
        pasts, presents = session.signature.pasts, session.signature.presents
        self._names = [port.name for port in (session.need(Role.LOGITS), *presents)]
        self._cache: dict[str, Any] = {
            past.name: session.empty(past.cache_shape(batch, 0), past.dtype) for past in pasts
        }

    def run(self, step: Step) -> Array:
        """Return logits [B, K, V]."""
        session = self._session
        arrays = step.feeds(session.signature)
        feeds = {name: session.value(array) for name, array in arrays.items()}
        logits, *presents = session.run_values(self._cache | feeds, self._names)
        self._cache = dict(zip(self._cache, presents, strict=True))
        return np.asarray(logits.numpy())

    def reorder(self, rows: Sequence[int], length: int) -> None:  # noqa: ARG002 - all of it
        """Let row i go on from what row ``rows[i]`` remembers."""
        self._held = [value.numpy()[list(rows)] for value in self._cache.values()]
        values = map(self._session.value, self._held)
        self._cache = dict(zip(self._cache, values, strict=True))


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailableError("onnxruntime", _INSTALL) from error
    return onnxruntime


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
