"""An opened model: what its inputs and outputs mean, and how it runs, whatever runs it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Final

import numpy as np

from llmopt import lazy
from llmopt.artifact.manifest import Manifest
from llmopt.errors import BackendUnavailableError, LlmoptError
from llmopt.interface.arrays import Array
from llmopt.interface.signature import Port, Role
from llmopt.interface.stepping import RunDecoder, Stepper
from llmopt.runtime.cores import usable_cores
from llmopt.spelling import name_of

_ALIGNMENT: Final = 64  # bytes: a cache line, and the widest vector

ENGINES: Final[Mapping[str, str]] = {
    "onnxruntime-arm64": "llmopt.runtime.engines.onnxruntime:OnnxRuntimeSession",
    "onnxruntime-cpu": "llmopt.runtime.engines.onnxruntime:OnnxRuntimeSession",
    "onnxruntime-cuda": "llmopt.runtime.engines.onnxruntime:OnnxRuntimeSession",
    "reference": "llmopt.runtime.engines.reference:ReferenceSession",
    "tensorrt": "llmopt.runtime.engines.tensorrt:TensorRtSession",
    "tensorrt-rtx": "llmopt.runtime.engines.tensorrt:TensorRtSession",
    "tvm-arm64": "llmopt.runtime.engines.tvm:TvmSession",
    "tvm-cpu": "llmopt.runtime.engines.tvm:TvmSession",
    "tvm-cuda": "llmopt.runtime.engines.tvm_cuda:TvmCudaSession",
}
"""What opens an artifact, by the name of its target."""


@dataclass(frozen=True)
class TimedOperator:
    """One operator of one run.

    Args:
        module: The source's module that it came from; empty where nothing says so.
        op: The operator, as its engine calls it.
        kernel_s: Duration of the kernel, seconds.
        seconds: The same and what lies between it and the operator before: the engine preparing
            it, and the profile being written.
    """

    module: str
    op: str
    kernel_s: float
    seconds: float


@dataclass(frozen=True)
class TimedRun:
    """One run of the model.

    Args:
        seconds: Duration of the run, with gaps between operators.
        operators: Operators in the order that they ran.
    """

    seconds: float
    operators: tuple[TimedOperator, ...]


class Session(abc.ABC):
    """An opened model and what its manifest says of its inputs and outputs.

    Args:
        manifest: The artifact's manifest.
        threads: Threads inside one operator; None for as many as the process may use.
    """

    def __init__(self, manifest: Manifest, threads: int | None = None) -> None:
        self.manifest = manifest
        self.signature = manifest.signature
        self.threads = threads or usable_cores()
        self.inputs = {port.name: port for port in manifest.signature.inputs}
        self.outputs = {port.name: port for port in manifest.signature.outputs}

    @abc.abstractmethod
    def run(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Return the outputs by name; ``names`` picks some of them.

        Raises:
            LlmoptError: The model could not be run on them.
        """

    @abc.abstractmethod
    def stepper(self, batch: int, capacity: int) -> Stepper:
        """Return a decoder with an empty memory.

        Args:
            batch: B.
            capacity: Most tokens a row can come to.
        """

    def plain_stepper(self, batch: int, capacity: int) -> Stepper:
        """Return one over `run`: caches are fed back as arrays, or none are kept."""
        outputs = [self.need(Role.LOGITS), *self.signature.presents]
        names = [port.name for port in outputs]
        decoder = RunDecoder(self.signature, lambda feeds: self.run(feeds, names))
        return decoder.stepper(batch, capacity)

    @property
    def profiles(self) -> bool:
        """Whether the engine tells how long each operator takes."""
        return False

    def profiled(self, work: Callable[[], None]) -> list[TimedRun]:
        """Return every run of the model that ``work`` causes, operator by operator.

        Raises:
            LlmoptError: What the engine told cannot be read.
        """
        raise NotImplementedError(f"{type(self).__name__} has profiles = {self.profiles}")

    def find(self, role: Role) -> Port | None:
        """Return the first input or output with this role, if there is one."""
        return self.signature.find(role)

    def need(self, role: Role) -> Port:
        """Return the first input or output with this role.

        Raises:
            LlmoptError: The model has none.
        """
        port = self.find(role)
        if port is None:
            task = self.manifest.task
            raise LlmoptError(f"this artifact (task {task!r}) has no '{role}' input or output")
        return port


def open_session(folder: Path, manifest: Manifest, threads: int | None = None) -> Session:
    """Open an artifact with what its target names.

    Args:
        folder: The artifact.
        manifest: Manifest of the artifact.
        threads: Threads inside one operator; None for as many as the process may use.

    Raises:
        BackendUnavailableError: What it needs is not here, or nothing here knows the target.
        ArtifactError: The model file cannot be opened, or is not what the manifest says.
    """
    name = name_of(manifest.target)
    if name not in ENGINES:
        known = ", ".join(ENGINES)
        raise BackendUnavailableError(name, f"{folder} is built for it, this runs: {known}")
    session: Session = lazy.load(ENGINES[name])(folder, manifest, threads)
    return session


def aligned_zeros(shape: Sequence[int], dtype: str) -> Array:
    """Return zeros that start at a multiple of 64 bytes, as wide vector loads like them."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def zeros_together(shapes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> list[Array]:
    """Return aligned zeros of each shape, cut from one piece of memory.

    The caches of a model are many and small; numpy asks for large pages for one piece of the
    size of all. Every page is touched here, so that the first step does not pay for it.
    """
    sizes = [
        int(np.prod(shape)) * np.dtype(dtype).itemsize
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    *starts, total = accumulate((-(-n // _ALIGNMENT) * _ALIGNMENT for n in sizes), initial=0)
    whole = aligned_zeros([total], "uint8")
    whole.fill(0)
    return [
        whole[start : start + size].view(dtype).reshape(shape)
        for start, size, shape, dtype in zip(starts, sizes, shapes, dtypes, strict=True)
    ]
