"""A cache that lives on a device: keys and values never cross to the host."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from llmopt.interface.arrays import Array
from llmopt.interface.signature import Role
from llmopt.interface.stepping import Step

if TYPE_CHECKING:
    from llmopt.runtime.engines.onnxruntime import Binding, OnnxRuntimeSession

_GRAPHS: Final[Iterator[int]] = itertools.count(1)
"""Numbers of captured graphs: ONNX Runtime keeps one for each, and 0 is its default."""


class OnnxRuntimeCache:
    """Past and present are one buffer a layer, on the device.

    Where the session captures graphs, a step of one token runs with the same buffers and sizes each
    time: its mask has room for every token there can be, and 0 where none is yet.

    Args:
        session: The model.
        batch: B.
        capacity: Most tokens a row can come to.
    """

    def __init__(self, session: OnnxRuntimeSession, batch: int, capacity: int) -> None:
        self._session = session
        self._capacity = capacity
        self._logits = session.need(Role.LOGITS).name
        self._caches = [
            (past, present, session.buffer(past.cache_shape(batch, capacity), past.dtype))
            for past, present in session.signature.cache_pairs()
        ]
        self._plain = self._bound()
        self._fixed: _Fixed | None = None

    def run(self, step: Step) -> Array:
        """Return logits [B, K, V]."""
        if step.tokens.shape[1] == 1 and self._session.place.captures:
            return self._run_fixed(step)
        for name, array in step.feeds(self._session.signature).items():
            self._plain.feed(name, array)
        self._plain.allocate(self._logits)
        self._plain.run(self._session.run_options())
        return self._plain.allocated(self._logits)

    def _bound(self) -> Binding:
        binding = self._session.bind()
        for past, present, buffer in self._caches:
            binding.share(past.name, present.name, buffer)
        return binding

    def _run_fixed(self, step: Step) -> Array:
        feeds = self._widened(step)
        if self._fixed is None:
            self._fixed = _Fixed.of(self._session, self._bound(), feeds)
        return self._fixed.run(feeds)

    def _widened(self, step: Step) -> dict[str, Array]:
        """Return the feeds with a mask of full capacity."""
        mask = np.zeros((len(step.mask), self._capacity), np.int64)
        mask[:, : step.mask.shape[1]] = step.mask
        widened = Step(step.tokens, mask, step.positions, every=False)
        feeds = widened.feeds(self._session.signature)
        # The default is one of one, and the host reads it, not the device.
        keep = self._session.find(Role.LOGITS_TO_KEEP)
        return {name: array for name, array in feeds.items() if keep is None or name != keep.name}


@dataclass(frozen=True)
class _Fixed:
    """A step of one token whose buffers and sizes never change.

    Args:
        session: The model.
        binding: All of its buffers.
        inputs: Inputs that are written before each run.
        logits: [B, 1, V], on the device.
        options: Name the captured graph.
    """

    session: OnnxRuntimeSession
    binding: Binding
    inputs: dict[str, Any]
    logits: Any
    options: Any

    @classmethod
    def of(cls, session: OnnxRuntimeSession, binding: Binding, feeds: dict[str, Array]) -> _Fixed:
        inputs = {}
        for name, array in feeds.items():
            inputs[name] = session.buffer(array.shape, str(array.dtype))
            binding.feed_value(name, inputs[name])
        port = session.need(Role.LOGITS)
        rows = len(feeds[session.need(Role.TOKENS).name])
        logits = session.buffer((rows, 1, session.manifest.model.vocabulary), port.dtype)
        binding.fetch_value(port.name, logits)
        graph = next(_GRAPHS)
        fixed = cls(session, binding, inputs, logits, session.run_options(graph))
        weakref.finalize(fixed, session.release, graph)
        return fixed

    def run(self, feeds: dict[str, Array]) -> Array:
        for name, array in feeds.items():
            self.inputs[name].update_inplace(array)
        self.binding.run(self.options)
        return np.asarray(self.logits.numpy())
