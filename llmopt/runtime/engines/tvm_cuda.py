"""Artifacts of TVM that run on an NVIDIA GPU, through TVM's own Python package.

Weights are copied to the GPU once, and the cache stays there: what one step gives as present is
the next one's past. The same code runs what was compiled for a processor, which is how it is
tested where there is no GPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from typing_extensions import override

from llmopt.artifact.fields import Fields
from llmopt.artifact.manifest import Manifest
from llmopt.artifact.signature import read_signature
from llmopt.errors import ArtifactError, BackendUnavailableError, LlmoptError
from llmopt.interface.arrays import Array
from llmopt.interface.signature import Role
from llmopt.interface.stepping import Step, Stepper
from llmopt.runtime.engines.tvm import INDEX, WEIGHTS
from llmopt.runtime.engines.tvm_runtime import another_path
from llmopt.runtime.session import Session

KERNELS: Final = "kernels.fatbin"
_TARGET: Final = "tvm-cuda"
_DRIVER: Final = "libcuda.so.1"
_INSTALL: Final = "pip install 'llmopt[runtime-tvm]'"
_COMPILE: Final = "tvm_callback_cuda_compile"  # what TVM calls for kernels that it has no code of
_COMPILER: Final = "tvm.support.nvcc"  # registers TVM's own
_FAILURES: Final = (RuntimeError, ValueError, TypeError, AttributeError, OSError)


def lacking() -> str:
    """Return what this machine lacks to run CUDA kernels with TVM; empty if nothing is known to."""
    if find_spec("tvm") is None:
        return _INSTALL
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return "an NVIDIA GPU and its driver"
    return ""


class DeviceLibrary:
    """Compiled functions and the weights they take, on a device.

    Args:
        entry: The shared library; what describes it lies beside it.
        device: ``"cuda"``, or ``"cpu"`` for what was compiled for a processor.

    Raises:
        BackendUnavailableError: TVM is not here, or has no such device.
        ArtifactError: A file is damaged.
    """

    def __init__(self, entry: Path, device: str) -> None:
        self._tvm = _import_tvm()
        self._device = _device(self._tvm, device)
        index = _read_index(entry.parent / INDEX)
        self.signature = read_signature(index)
        self.functions = frozenset(index.mapping("functions"))
        if device == "cuda":
            _register(index.text("kernels_of"), entry.parent / KERNELS)
        self._machine = self._opened(entry)
        self._weights = list(self._copied(entry.parent / WEIGHTS, index))

    @property
    def capability(self) -> str:
        """The device's compute capability, ``"9.0"``; empty for a processor."""
        return str(self._device.compute_version or "")

    def tensor(self, array: Array, dtype: str) -> Any:
        """Return a copy of ``array`` on the device."""
        return self._tvm.runtime.tensor(np.ascontiguousarray(array, dtype), self._device)

    def call(self, feeds: Mapping[str, Any], *, every: bool) -> dict[str, Any]:
        """Return the outputs, which stay on the device, by name.

        Args:
            feeds: Arrays, or tensors of the device, by input name.
            every: Whether logits of all new tokens are wanted, or of the last one only.

        Raises:
            LlmoptError: It could not be run.
        """
        name = self._function(feeds, every=every)
        try:
            found = self._machine[name](*self._arguments(feeds), self._weights)
        except _FAILURES as error:
            raise LlmoptError(f"tvm could not run {name!r}: {_last_line(error)}") from error
        return {port.name: x for port, x in zip(self.signature.outputs, found, strict=True)}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs as arrays; a ``logits_to_keep`` says how many tokens have logits."""
        port = self.signature.find(Role.LOGITS_TO_KEEP)
        keep = 1 if port is None else int(feeds.get(port.name, np.asarray(1)))
        found = self.call(feeds, every=port is None or keep != 1)
        arrays = {name: x.numpy() for name, x in found.items()}
        logits = self.signature.find(Role.LOGITS)
        if logits is not None and port is not None and keep > 1:
            arrays[logits.name] = arrays[logits.name][:, -keep:]
        return arrays

    def _function(self, feeds: Mapping[str, Any], *, every: bool) -> str:
        if not self.signature.has_cache:
            return "main"
        tokens = self.signature.find(Role.TOKENS)
        assert tokens is not None
        if feeds[tokens.name].shape[1] == 1:
            return "decode"
        return "score" if every or "prefill" not in self.functions else "prefill"

    def _arguments(self, feeds: Mapping[str, Any]) -> Iterator[Any]:
        for port in self.signature.inputs:
            if port.role == Role.LOGITS_TO_KEEP:
                continue
            if port.name not in feeds:
                raise LlmoptError(f"input {port.name!r} is missing")
            given = feeds[port.name]
            yield self.tensor(given, port.dtype) if isinstance(given, np.ndarray) else given
        if self.signature.has_cache and self.signature.find(Role.MASK) is None:
            yield self.tensor(np.ones(self._whole(feeds)), "int64")

    def _whole(self, feeds: Mapping[str, Any]) -> tuple[int, int]:
        """Return how many sequences there are, and how many tokens, past and new."""
        tokens, past = self.signature.find(Role.TOKENS), self.signature.find(Role.PAST_KEY)
        assert tokens is not None
        assert past is not None
        batch, new = feeds[tokens.name].shape
        return batch, feeds[past.name].shape[2] + new

    def _copied(self, path: Path, index: Fields) -> Iterator[Any]:
        try:
            data = np.memmap(path, np.uint8, mode="r")
            for entry in index.items("weights"):
                start, shape = entry.number("offset"), entry.numbers("shape")
                dtype = np.dtype(entry.text("dtype"))
                size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
                part = data[start : start + size].view(dtype).reshape(shape)
                yield self.tensor(part, dtype.name)
        except (OSError, ValueError) as error:
            raise ArtifactError(path, f"cannot be read ({_last_line(error)})") from error

    def _opened(self, entry: Path) -> Any:
        try:
            with another_path(entry) as path:
                module = self._tvm.runtime.load_module(str(path))
            return self._tvm.runtime.vm.VirtualMachine(module, self._device)
        except _FAILURES as error:
            raise ArtifactError(entry, f"tvm cannot open it: {_last_line(error)}") from error


class TvmCudaSession(Session):
    """An artifact opened by TVM on a GPU.

    Args:
        folder: The artifact.
        manifest: Manifest of the artifact.
        threads: Not heeded: kernels run on the GPU.

    Raises:
        BackendUnavailableError: TVM or the GPU is not here, or it is older than the kernels.
        ArtifactError: A file is damaged.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None = None) -> None:
        super().__init__(manifest, threads)
        if missing := lacking():
            raise BackendUnavailableError(_TARGET, f"it needs {missing}")
        machine = manifest.requires.get("machine", platform.machine())
        if machine != platform.machine():
            reason = f"its host code is for {machine}, not {platform.machine()}"
            raise BackendUnavailableError(_TARGET, reason)
        self.library = self._open(folder / manifest.entry)

    def _open(self, entry: Path) -> DeviceLibrary:
        library = DeviceLibrary(entry, "cuda")
        check_capability(library.capability, self.manifest.requires)
        return library

    @override
    def run(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        found = self.library.run(feeds)
        return {name: found[name] for name in names or self.outputs}

    @override
    def stepper(self, batch: int, capacity: int) -> Stepper:
        if self.signature.has_cache:
            return KeptCache(self, batch)
        return self.plain_stepper(batch, capacity)


class KeptCache:
    """Present is past and the new tokens: tensors that stay on the device from step to step.

    Args:
        session: The model.
        batch: B.
    """

    def __init__(self, session: TvmCudaSession, batch: int) -> None:
        self._session = session
        self._signature = signature = session.signature
        self._pairs = signature.cache_pairs()
        self._cache = {
            past.name: session.library.tensor(np.zeros(past.cache_shape(batch, 0)), past.dtype)
            for past in signature.pasts
        }

    def run(self, step: Step) -> Array:
        """Return logits [B, K, V]."""
        feeds = {**self._cache, **step.feeds(self._signature)}
        found = self._session.library.call(feeds, every=step.every)
        self._cache = {past.name: found[present.name] for past, present in self._pairs}
        logits: Array = found[self._signature.need(Role.LOGITS).name].numpy()
        return logits


def check_capability(capability: str, requires: Mapping[str, Any]) -> None:
    """Raise if a GPU is older than the kernels.

    Args:
        capability: Compute capability of the GPU, ``"7.5"``.
        requires: Requirements of the artifact, ``{"cuda_arch": "sm_80"}``.

    Raises:
        BackendUnavailableError: It is.
    """
    wanted = str(requires.get("cuda_arch", "sm_0")).removeprefix("sm_")
    if int(capability.replace(".", "") or 0) < int(wanted):
        raise BackendUnavailableError(
            _TARGET,
            f"the GPU has compute capability {capability}, the kernels need "
            f"{wanted[:-1]}.{wanted[-1]}; "
            f"compile with --target 'tvm-cuda{{arch=sm_{capability.replace('.', '')}}}'",
        )


@functools.cache
def _known_kernels() -> dict[str, bytes]:
    """Return the compiled kernels of opened artifacts, by the sha256 of their source."""
    return {}


def _register(source: str, kernels: Path) -> None:
    """Let TVM use compiled kernels for source of a certain sha256, and compile any other."""
    from tvm_ffi import get_global_func, register_global_func

    try:
        binary = kernels.read_bytes()
    except OSError as error:
        raise ArtifactError(kernels, f"cannot be read ({_last_line(error)})") from error
    known = _known_kernels()
    if not known:
        importlib.import_module(_COMPILER)  # before ours: what is registered twice is refused
        otherwise = get_global_func(_COMPILE, allow_missing=True)

        def compiled(code: str) -> Any:
            found = known.get(hashlib.sha256(code.encode()).hexdigest())
            if found is not None:
                return found
            if otherwise is None:
                raise RuntimeError("the artifact has no kernels of this source")
            return otherwise(code)

        register_global_func(_COMPILE, compiled, override=True)
    known[source] = binary


def _device(tvm: Any, name: str) -> Any:
    device = tvm.device(name, 0)
    if not device.exist:
        reason = lacking() or "a GPU that TVM sees, and CUDA's runtime (libcudart) where it looks"
        raise BackendUnavailableError(_TARGET, f"it needs {reason}")
    return device


def _import_tvm() -> Any:
    try:
        import tvm
    except ImportError as error:
        raise BackendUnavailableError(_TARGET, f"it needs tvm; {_INSTALL}") from error
    return tvm


def _read_index(path: Path) -> Fields:
    try:
        return Fields(json.loads(path.read_text(encoding="utf-8")), path)
    except (OSError, ValueError) as error:
        raise ArtifactError(path, f"cannot be read ({_last_line(error)})") from error


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
