"""Running an engine of TensorRT or TensorRT-RTX on an NVIDIA GPU.

An engine that was built ahead of time is a file of the artifact; otherwise it is built, checked and
cached when the artifact is opened for the first time on a machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from typing_extensions import override

from llmopt.artifact.manifest import Manifest
from llmopt.errors import ArtifactError, BackendUnavailableError, LlmoptError
from llmopt.interface.arrays import Array
from llmopt.interface.signature import Port, Role
from llmopt.interface.stepping import Step, Stepper
from llmopt.runtime.engines.cuda_driver import Driver, Memory
from llmopt.runtime.engines.tensorrt_build import import_tensorrt
from llmopt.runtime.engines.tensorrt_cache import cached_engine
from llmopt.runtime.engines.tensorrt_recipe import (
    GOLDEN,
    RECIPE,
    EngineRecipe,
    Profile,
    engine_file,
)
from llmopt.runtime.session import Session
from llmopt.spelling import name_of

_ITEM_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}


class TensorRtSession(Session):
    """An artifact opened by TensorRT.

    Args:
        folder: The artifact.
        manifest: Manifest of the artifact.
        threads: Not used: the work is the GPU's.

    Raises:
        BackendUnavailableError: TensorRT, the driver or the GPU is not here, or not those that the
            engine was built for.
        ArtifactError: The engine or its recipe cannot be read.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None = None) -> None:
        super().__init__(manifest, threads)
        self.recipe = EngineRecipe.load(folder / RECIPE)
        target = name_of(manifest.target)
        trt = import_tensorrt(self.recipe.package, target)
        _check_version(manifest, self.recipe.package, str(trt.__version__))
        self.driver = Driver(target)
        content, fresh = self._content(folder, trt)
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise ArtifactError(folder, "TensorRT cannot read the engine on this GPU")
        self._host = trt.TensorLocation.HOST
        self._input = trt.TensorIOMode.INPUT
        self._contexts = [self._context(i) for i in range(len(self.recipe.profiles))]
        self._memory: dict[str, Memory] = {}
        if fresh:
            self._check_golden(folder)

    @override
    def stepper(self, batch: int, capacity: int) -> Stepper:
        if self.manifest.model.cache == "none":
            return self.plain_stepper(batch, capacity)
        return TensorRtCache(self, batch, capacity)

    @override
    def run(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        return self.execute(feeds, {}, list(names or self.outputs))

    def execute(
        self, feeds: Mapping[str, Array], resident: Mapping[str, Memory], names: Sequence[str]
    ) -> dict[str, Array]:
        """Run the engine once.

        Args:
            feeds: Inputs, by name.
            resident: Inputs and outputs that stay on the device: the cache.
            names: The outputs to fetch.

        Raises:
            LlmoptError: The sizes are beyond what the engine was built for, or it fails.
        """
        index = self._profile(feeds)
        context = self._contexts[index]
        alive = [self._feed(context, name, array) for name, array in feeds.items()]
        self._hold(context, resident)
        outputs = [name for name in self._names(inputs=False) if name not in resident]
        for name in outputs:
            shape = tuple(context.get_tensor_shape(name))
            size = math.prod(shape) * np.dtype(self.outputs[name].dtype).itemsize
            context.set_tensor_address(name, self._room(name, size).pointer)
        if not context.execute_async_v3(self.driver.stream):
            raise LlmoptError("TensorRT could not run the engine; its messages are above")
        found = {
            name: self.driver.download(
                self._memory[name].pointer,
                tuple(context.get_tensor_shape(name)),
                self.outputs[name].dtype,
            )
            for name in names
            if name not in resident
        }
        del alive  # numbers that the engine read from host memory
        return found

    def _content(self, folder: Path, trt: Any) -> tuple[bytes, bool]:
        """Return the engine, and whether it was built just now."""
        capability = self.driver.capability
        if not self.recipe.capabilities:
            return cached_engine(folder, self.manifest, self.recipe, trt, self.driver)
        if capability not in self.recipe.capabilities:
            made = ", ".join(self.recipe.capabilities)
            option = capability.replace(".", "")
            problem = (
                f"{folder} has engines for compute capability {made}, this GPU "
                f"({self.driver.name}) has {capability}; compile with sm={option}"
            )
            raise BackendUnavailableError(self.manifest.target, problem)
        path = folder / engine_file(capability)
        try:
            return path.read_bytes(), False
        except OSError as error:
            raise ArtifactError(path, error.strerror or str(error)) from error

    def _context(self, index: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(index, self.driver.stream):
            raise LlmoptError("TensorRT could not prepare the engine: is the GPU's memory full?")
        return context

    def _names(self, *, inputs: bool) -> list[str]:
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        return [n for n in names if (self._engine.get_tensor_mode(n) == self._input) == inputs]

    def _profile(self, feeds: Mapping[str, Array]) -> int:
        """Return the narrowest profile that serves these sizes: the last one that does."""
        for index in reversed(range(len(self.recipe.profiles))):
            if exceeded(self.recipe.profiles[index], feeds) is None:
                return index
        problem = exceeded(self.recipe.profiles[0], feeds)
        raise LlmoptError(
            f"{problem}; send less at once, or compile with a larger --batch or --max-length"
        )

    def _feed(self, context: Any, name: str, array: Array) -> Array:
        """Hand an input over; what the engine reads on the host has to stay alive."""
        held = np.ascontiguousarray(array)
        if self._engine.get_tensor_location(name) == self._host:
            context.set_tensor_address(name, held.ctypes.data)
            return held
        context.set_input_shape(name, array.shape)
        memory = self._room(name, held.nbytes)
        self.driver.upload(memory.pointer, held)
        context.set_tensor_address(name, memory.pointer)
        return held

    def _hold(self, context: Any, resident: Mapping[str, Memory]) -> None:
        for name, memory in resident.items():
            if name in self.inputs:
                context.set_input_shape(name, memory.shape)
            context.set_tensor_address(name, memory.pointer)

    def _room(self, name: str, size_bytes: int) -> Memory:
        """Return memory of at least this size for an input or output, kept from run to run."""
        known = self._memory.get(name)
        if known is None or known.size_bytes < size_bytes:
            self._memory[name] = known = self.driver.allocate((size_bytes,))
        return known

    def _check_golden(self, folder: Path) -> None:
        """Compare an engine that was just built with what its network computed elsewhere.

        Raises:
            LlmoptError: It is further off than rounding explains.
        """
        path = folder / GOLDEN
        if not path.is_file():
            return
        with np.load(path, allow_pickle=False) as stored:
            given = {n[3:]: stored[n] for n in stored.files if n.startswith("in.")}
            wanted = {n[4:]: stored[n] for n in stored.files if n.startswith("out.")}
        found = self._compute(given)
        for name, right in wanted.items():
            error = float(np.max(np.abs(found[name] - right)) / (np.max(np.abs(right)) or 1.0))
            if not error <= self.recipe.tolerance:
                raise LlmoptError(
                    f"the engine that was built here is wrong: {name} is off by {error:.2g}, "
                    f"allowed {self.recipe.tolerance:.2g}; update TensorRT or the driver"
                )

    def _compute(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        if self.manifest.model.cache == "none":
            return self.run(feeds)
        tokens = feeds[self.need(Role.TOKENS).name]
        mask, positions = feeds[self.need(Role.MASK).name], np.maximum(0, _positions(feeds, self))
        step = Step(tokens, mask, positions, every=True)
        batch, length = tokens.shape
        return {self.need(Role.LOGITS).name: self.stepper(batch, length).run(step)}


class TensorRtCache:
    """Keys and values of past tokens, kept on the device and written in place.

    Args:
        session: The model.
        batch: B.
        capacity: Most tokens a row can come to.

    Raises:
        LlmoptError: The engine was built for fewer sequences or tokens.
    """

    def __init__(self, session: TensorRtSession, batch: int, capacity: int) -> None:
        self._session = session
        pairs = session.signature.cache_pairs()
        slots = pairs[0][0].shape[2]
        assert isinstance(slots, int)
        self._slots = slots
        most = int(session.manifest.requires.get("batch", batch))
        if batch > most or capacity > slots:
            raise LlmoptError(
                f"{batch} sequences of {capacity} tokens are more than the engine's {most} of "
                f"{slots}; compile with a larger --batch or --max-length"
            )
        self._chunk = int(session.manifest.requires.get("chunk", slots))
        self._held: dict[str, Memory] = {}
        for past, present in pairs:
            memory = self._allocate(past, batch)
            self._held |= {past.name: memory, present.name: memory}

    def run(self, step: Step) -> Array:
        """Return logits [B, K, V]; prompts longer than the engine's chunk take several runs."""
        past = step.mask.shape[1] - step.tokens.shape[1]
        pieces = [
            self._run(step, slice(start, start + self._chunk), past + start)
            for start in range(0, step.tokens.shape[1], self._chunk)
        ]
        return np.concatenate(pieces, axis=1) if step.every else pieces[-1]

    def _run(self, step: Step, part: slice, start: int) -> Array:
        session = self._session
        batch = len(step.tokens)
        mask = np.zeros((batch, self._slots), step.mask.dtype)
        mask[:, : step.mask.shape[1]] = step.mask
        piece = Step(step.tokens[:, part], mask, step.positions[:, part], step.every)
        feeds = piece.feeds(session.signature)
        feeds[Role.WRITE_INDICES] = np.full(batch, start, np.int64)
        keep = session.find(Role.LOGITS_TO_KEEP)
        if keep is not None:
            feeds[keep.name] = np.asarray(piece.tokens.shape[1] if step.every else 1, np.int64)
        name = session.need(Role.LOGITS).name
        return session.execute(feeds, self._held, [name])[name]

    def _allocate(self, port: Port, batch: int) -> Memory:
        shape = port.cache_shape(batch, self._slots)
        return self._session.driver.allocate(shape, _ITEM_BYTES[port.dtype])


@dataclass(frozen=True)
class _Excess:
    """An input that is beyond a profile."""

    name: str
    sizes: tuple[int, ...]
    most: tuple[int, ...]

    def __str__(self) -> str:
        return f"input {self.name!r} of {list(self.sizes)} exceeds the engine's {list(self.most)}"


def exceeded(profile: Profile, feeds: Mapping[str, Array]) -> _Excess | None:
    """Return the first input that a profile does not serve, None if it serves all."""
    for name, bounds in profile.shapes.items():
        if name in feeds and not bounds.holds(feeds[name].shape):
            return _Excess(name, feeds[name].shape, bounds.most)
    for name, bounds in profile.values.items():
        numbers = tuple(int(n) for n in feeds[name].reshape(-1)) if name in feeds else bounds.best
        if not bounds.holds(numbers):
            return _Excess(name, numbers, bounds.most)
    return None


def _positions(feeds: Mapping[str, Array], session: Session) -> Array:
    port = session.find(Role.POSITIONS)
    if port is not None and port.name in feeds:
        return feeds[port.name]
    return np.asarray(feeds[session.need(Role.MASK).name].cumsum(axis=1) - 1)


def _check_version(manifest: Manifest, package: str, here: str) -> None:
    made = manifest.requires.get(package)
    if made is not None and str(made) != here:
        problem = (
            f"the engine was built by {package} {made}, this is {here}, and engines work with the "
            f"version that built them; install {package} {made}, or compile again"
        )
        raise BackendUnavailableError(manifest.target, problem)
