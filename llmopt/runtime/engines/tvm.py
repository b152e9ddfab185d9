"""An artifact for TVM: opening a library, mapping its weights, calling its functions."""

from __future__ import annotations

import dataclasses
import json
import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from typing_extensions import override

from llmopt.artifact.fields import Fields
from llmopt.artifact.manifest import Manifest
from llmopt.artifact.signature import read_signature
from llmopt.errors import ArtifactError, BackendUnavailableError, LlmoptError, UsageError
from llmopt.interface.arrays import Array
from llmopt.interface.signature import Role
from llmopt.interface.stepping import Step, Stepper
from llmopt.runtime.cores import usable_cores
from llmopt.runtime.cpu_features import processor_features
from llmopt.runtime.engines.tvm_profile import Stopwatch
from llmopt.runtime.engines.tvm_runtime import another_path, check_process, last_line, load_runtime
from llmopt.runtime.session import Session, TimedRun, aligned_zeros, zeros_together

INDEX: Final = "model.json"
WEIGHTS: Final = "weights.bin"
_CPU: Final = 1  # DLPack's number of the device
_POOLED: Final = 2  # memory that a call gives back is kept for the next
_FAILURES: Final = (RuntimeError, ValueError, TypeError, AttributeError)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What memory was planned for.

    Args:
        batch: Most sequences at once.
        tokens: Most new tokens at once; 0 for any.
    """

    batch: int
    tokens: int


class TvmLibrary:
    """Compiled functions and the weights they take.

    Args:
        entry: The shared library; what describes it lies beside it.
        threads: Threads inside one kernel; None for as many as the process may use.

    Raises:
        BackendUnavailableError: TVM's runtime is not here.
        ArtifactError: A file is damaged.
    """

    def __init__(self, entry: Path, threads: int | None = None) -> None:
        self._ffi = load_runtime(threads or usable_cores())
        index = _read_index(entry.parent / INDEX)
        self.signature = read_signature(index)
        self.limits = Limits(index.number("batch"), index.number("tokens"))
        described = index.mapping("functions")
        self.functions = frozenset(str(name) for name in described)
        self._callers = {str(name): told.get("calls", {}) for name, told in described.items()}
        self._weights = self._ffi.convert(self._mapped(entry.parent / WEIGHTS, index))
        self._machine = self._opened(entry)
        self._lock = threading.Lock()  # the machine keeps the registers of one call at a time

    def call(self, name: str, arguments: Sequence[Any]) -> Any:
        """Return the results of a function; calls from several threads wait for one another.

        Raises:
            LlmoptError: The function failed.
            BackendUnavailableError: The process is a fork of the one that loaded TVM.
        """
        check_process()
        try:
            with self._lock:
                return self._machine[name](*arguments, self._weights)
        except _FAILURES as error:
            raise LlmoptError(f"tvm could not run {name!r}: {last_line(error)}") from error

    def profiled(self, work: Callable[[], None]) -> list[TimedRun]:
        """Return every call of a function that ``work`` makes, kernel by kernel."""
        watch = Stopwatch(self._callers)
        usual = self.call

        def call(name: str, arguments: Sequence[Any]) -> Any:
            with watch.running(name):
                return usual(name, arguments)

        self._machine["set_instrument"](self._ffi.convert(watch))
        self.call = call  # type: ignore[method-assign]
        try:
            work()
        finally:
            del self.call
            # There is no way to take an instrument off: from now on it is one that does nothing.
            watch.off = True
        return watch.runs

    def tensor(self, array: Array) -> Any:
        """Return ``array``, which starts at a multiple of 64 bytes, as a tensor of TVM's."""
        return self._ffi.from_dlpack(array)

    def copied(self, array: Array, dtype: str) -> Any:
        """Return a copy of ``array`` as a tensor of TVM's."""
        return self.tensor(_aligned(array, dtype))

    def _mapped(self, path: Path, index: Fields) -> list[Any]:
        """Return the weights, read from the file when they are first used."""
        try:
            data = np.memmap(path, np.uint8, mode="c")  # private and writable, as DLPack asks
            return [self.tensor(_part(data, entry)) for entry in index.items("weights")]
        except (OSError, ValueError) as error:
            raise ArtifactError(path, f"cannot be mapped ({last_line(error)})") from error

    def _opened(self, entry: Path) -> Any:
        try:
            with another_path(entry) as path:
                machine = self._ffi.load_module(str(path))["vm_load_executable"]()
            machine["vm_initialization"](_CPU, 0, _POOLED)
        except (*_FAILURES, OSError) as error:
            raise ArtifactError(entry, f"tvm cannot open it: {last_line(error)}") from error
        return machine


def _part(data: Array, entry: Fields) -> Array:
    start, shape = entry.number("offset"), entry.numbers("shape")
    dtype = np.dtype(entry.text("dtype"))
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return data[start : start + size].view(dtype).reshape(shape)


def _read_index(path: Path) -> Fields:
    try:
        return Fields(json.loads(path.read_text(encoding="utf-8")), path)
    except (OSError, ValueError) as error:
        raise ArtifactError(path, f"cannot be read ({last_line(error)})") from error


def run_once(library: TvmLibrary, feeds: Mapping[str, Array], prefix: str = "") -> dict[str, Array]:
    """Return every output for inputs by name, however many sequences there are.

    A past is copied into caches with room for the new tokens; what comes out as present is those.

    Args:
        library: The functions.
        feeds: Arrays by input name.
        prefix: Prefix of the functions' names: ``"exact_"`` for those that verification runs.
    """
    batch = max(len(array) for array in feeds.values() if array.ndim)
    most = library.limits.batch
    parts = [
        _run_part(library, _rows(feeds, slice(start, start + most)), prefix)
        for start in range(0, batch, most)
    ]
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rows(feeds: Mapping[str, Array], part: slice) -> dict[str, Array]:
    return {name: array[part] if array.ndim else array for name, array in feeds.items()}


def _run_part(library: TvmLibrary, feeds: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    signature = library.signature
    if signature.has_cache:
        return _run_cached(library, feeds, prefix)
    ports = [port for port in signature.inputs if port.role != Role.LOGITS_TO_KEEP]
    arguments = [library.copied(feeds[port.name], port.dtype) for port in ports]
    results = library.call(f"{prefix}main", arguments)
    found = [np.from_dlpack(result) for result in results]
    return {port.name: x for port, x in zip(signature.outputs, found, strict=True)}


def _run_cached(library: TvmLibrary, feeds: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    by_role = {port.role: feeds.get(port.name) for port in library.signature.inputs}
    tokens = by_role[Role.TOKENS]
    assert tokens is not None
    pairs = library.signature.cache_pairs()
    before = feeds[pairs[0][0].name].shape[2]
    total = before + tokens.shape[1]
    caches = TvmCaches(library, len(tokens), total)
    for past, _ in pairs:
        caches.arrays[past.name][:, :, :before] = feeds[past.name]
    mask, keep = by_role.get(Role.MASK), by_role.get(Role.LOGITS_TO_KEEP)
    positions = by_role.get(Role.POSITIONS)
    if mask is None:
        mask = np.ones((len(tokens), total), np.int64)
    if positions is None:
        positions = np.broadcast_to(np.arange(before, total), tokens.shape)
    every = keep is not None and int(keep) != 1
    logits = np.array(caches.run(Step(tokens, mask, positions, every), prefix))
    if every and int(np.asarray(keep)) > 0:
        logits = logits[:, -int(np.asarray(keep)) :]
    outputs = {present.name: caches.arrays[past.name][:, :, :total] for past, present in pairs}
    return {library.signature.need(Role.LOGITS).name: logits, **outputs}


class TvmCaches:
    """Keys and values of past tokens, which functions write in place.

    Args:
        library: The functions.
        batch: B.
        capacity: Most tokens a row can come to.
    """

    def __init__(self, library: TvmLibrary, batch: int, capacity: int) -> None:
        self._library = library
        pasts = library.signature.pasts
        shapes = [port.cache_shape(batch, capacity) for port in pasts]
        zeros = zeros_together(shapes, [port.dtype for port in pasts])
        self.arrays = {port.name: array for port, array in zip(pasts, zeros, strict=True)}
        self._tensors = {name: library.tensor(array) for name, array in self.arrays.items()}

    def run(self, step: Step, prefix: str = "") -> Array:
        """Return logits [B, K, V]: of the last token, or of all where the step wants every."""
        batch, new = step.tokens.shape
        if batch == new == 1:
            return self._call(f"{prefix}decode", step)
        name = f"{prefix}{'score' if step.every else 'prefill'}"
        if name not in self._library.functions:
            name = f"{prefix}score"
        pieces = [self._call(name, piece) for piece in self._pieces(step)]
        return np.concatenate(pieces, axis=1) if step.every and len(pieces) > 1 else pieces[-1]

    def _pieces(self, step: Step) -> Iterator[Step]:
        """Yield a step as steps of as many tokens as memory was planned for."""
        new, total = step.tokens.shape[1], step.mask.shape[1]
        most = self._library.limits.tokens or new
        for start in range(0, new, most):
            part = slice(start, min(start + most, new))
            mask = step.mask[:, : total - new + part.stop]
            yield Step(step.tokens[:, part], mask, step.positions[:, part], step.every)

    def _call(self, name: str, step: Step) -> Array:
        return np.from_dlpack(self._library.call(name, list(self._arguments(step))))

    def _arguments(self, step: Step) -> Iterator[Any]:
        library = self._library
        by_role = {
            Role.TOKENS: step.tokens,
            Role.MASK: step.mask,
            Role.POSITIONS: step.positions,
            Role.TOKEN_TYPES: np.zeros_like(step.tokens),
        }
        for port in library.signature.inputs:
            if port.name in self._tensors:
                yield self._tensors[port.name]
            elif port.role in by_role:
                yield library.copied(by_role[port.role], port.dtype)
        if library.signature.find(Role.MASK) is None:
            yield library.copied(step.mask, "int64")


class TvmSession(Session):
    """An artifact opened by TVM's runtime.

    Args:
        folder: The artifact.
        manifest: Manifest of the artifact.
        threads: Threads inside one kernel; None for as many as the process may use.

    Raises:
        BackendUnavailableError: TVM's runtime is not here, or the processor lacks a feature.
        ArtifactError: The library cannot be opened.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None = None) -> None:
        super().__init__(manifest, threads)
        check_processor(manifest.target, manifest.requires)
        self._library = TvmLibrary(folder / manifest.entry, self.threads)

    @property
    @override
    def profiles(self) -> bool:
        return True

    @override
    def profiled(self, work: Callable[[], None]) -> list[TimedRun]:
        return self._library.profiled(work)

    @override
    def run(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        found = run_once(self._library, feeds)
        return {name: found[name] for name in names or self.outputs}

    @override
    def stepper(self, batch: int, capacity: int) -> Stepper:
        if not self.signature.has_cache:
            return self.plain_stepper(batch, capacity)
        most = self._library.limits.batch
        if batch > most:
            raise UsageError(
                f"{batch} sequences at once, and the artifact was built for {most}: "
                f"compile it with --batch {batch}"
            )
        return TvmCaches(self._library, batch, capacity)


def check_processor(target: str, requires: Mapping[str, Any]) -> None:
    """Raise unless this processor runs code that was built for ``requires``.

    Raises:
        BackendUnavailableError: It is another machine, or lacks a feature.
    """
    machine = requires.get("machine", platform.machine())
    if machine != platform.machine():
        raise BackendUnavailableError(target, f"it is code for {machine}, not {platform.machine()}")
    missing = sorted(set(requires.get("cpu_features", ())) - processor_features())
    if missing:
        raise BackendUnavailableError(
            target,
            f"this processor lacks {', '.join(missing)}; compile for it with "
            f"--target '{target.partition('{')[0]}{{mcpu=…}}'",
        )


def _aligned(array: Array, dtype: str) -> Array:
    result = aligned_zeros(array.shape, dtype)
    result[...] = array
    return result
