"""Decoding step by step: one driver, whatever runs the model and wherever its cache is kept.

`Sequences` keeps the mask and the positions; a `Stepper` keeps the cache. A runtime's session has
steppers of its own, and a `RunDecoder` makes one of any function that runs a model, so that what
is proven is driven as what is deployed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from llmopt.errors import UsageError
from llmopt.interface.arrays import Array, Arrays, Run
from llmopt.interface.signature import Role, Signature


@dataclass(frozen=True)
class Step:
    """What one call of a decoder takes.

    Args:
        tokens: [B, S] int64, the new tokens.
        mask: [B, T] int64, 1 where a token is real, for past and new tokens.
        positions: [B, S] int64.
        every: Whether logits of all S positions are wanted, or of the last one only.
        steady: Inputs that are the same in every step: what a model that reads has made of it.
        embeds: [B, S, E], of the tokens, where the model takes those.
    """

    tokens: Array
    mask: Array
    positions: Array
    every: bool
    steady: Mapping[str, Array] = field(default_factory=dict)
    embeds: Array | None = None

    @property
    def entering(self) -> tuple[Role, Array]:
        """The role and the numbers of what the first layer is made of."""
        return (Role.TOKENS, self.tokens) if self.embeds is None else (Role.EMBEDS, self.embeds)

    def feeds(self, signature: Signature) -> Arrays:
        """Return the inputs that a model of this signature has, by name; its cache is not there."""
        role, entering = self.entering
        by_role = {
            role: entering,
            Role.MASK: self.mask,
            Role.POSITIONS: self.positions,
            Role.TOKEN_TYPES: np.zeros_like(self.tokens),
            Role.LOGITS_TO_KEEP: np.array(0 if self.every else 1, np.int64),
        }
        ports = ((array, signature.find(role)) for role, array in by_role.items())
        feeds = {
            port.name: np.ascontiguousarray(array, port.dtype).reshape(array.shape)
            for array, port in ports
            if port is not None
        }
        return {**feeds, **self.steady}


class Stepper(Protocol):
    """A decoder with a memory of the steps before."""

    def run(self, step: Step) -> Array:
        """Return logits [B, K, V]; the array is overwritten by the next run."""


@runtime_checkable
class Reorders(Protocol):
    """A decoder whose memory can be handed to other rows."""

    def reorder(self, rows: Sequence[int], length: int) -> None:
        """Let row i go on from what row ``rows[i]`` remembers.

        Args:
            rows: [B].
            length: Tokens that are remembered.
        """


class Steppable(Protocol):
    """What makes steppers: a runtime's session, or a `RunDecoder`."""

    def stepper(self, batch: int, capacity: int) -> Stepper:
        """Return a decoder with an empty memory.

        Args:
            batch: B.
            capacity: Most tokens a row can come to.
        """


@dataclass(frozen=True)
class RunDecoder:
    """A decoder over any function that runs a model.

    Args:
        signature: The model's inputs and outputs.
        run: The function.
    """

    signature: Signature
    run: Run

    def stepper(self, batch: int, capacity: int) -> Stepper:  # noqa: ARG002 - arrays grow
        """Return a decoder with an empty memory."""
        if self.signature.has_cache:
            return FedBackCache(self.signature, self.run, batch)
        return NoCache(self.signature, self.run)


class NoCache:
    """The model has no cache: every step runs the whole prefix again.

    Args:
        signature: The model's inputs and outputs.
        run: The model.
    """

    def __init__(self, signature: Signature, run: Run) -> None:
        self._signature = signature
        self._run = run
        self._logits = signature.need(Role.LOGITS).name
        self._tokens: Array | None = None
        self._positions: Array | None = None

    def run(self, step: Step) -> Array:
        """Return logits [B, K, V]."""
        new = step.tokens.shape[1]
        self._tokens = _after(self._tokens, step.tokens)
        self._positions = _after(self._positions, step.positions)
        every = step.every or new > 1
        prefix = Step(self._tokens, step.mask, self._positions, every, step.steady)
        return self._run(prefix.feeds(self._signature))[self._logits][:, -new:]


class FedBackCache:
    """Present is past and the new tokens: other arrays at each step, fed back to the next.

    Args:
        signature: The model's inputs and outputs.
        run: The model.
        batch: B.
    """

    def __init__(self, signature: Signature, run: Run, batch: int) -> None:
        self._signature = signature
        self._run = run
        self._logits = signature.need(Role.LOGITS).name
        self._pairs = [(past.name, present.name) for past, present in signature.cache_pairs()]
        self._cache = signature.empty_caches(batch)

    def run(self, step: Step) -> Array:
        """Return logits [B, K, V]."""
        outputs = self._run({**self._cache, **step.feeds(self._signature)})
        self._cache = {past: outputs[present] for past, present in self._pairs}
        return outputs[self._logits]

    def reorder(self, rows: Sequence[int], length: int) -> None:  # noqa: ARG002 - all of it
        """Let row i go on from what row ``rows[i]`` remembers."""
        self._cache = {name: array[list(rows)] for name, array in self._cache.items()}


class Sequences:
    """A batch of token sequences that grow together.

    Args:
        decoder: The model.
        batch: B.
        capacity: Most tokens a row can come to.
        steady: Inputs that are the same in every step.
    """

    def __init__(
        self,
        decoder: Steppable,
        batch: int,
        capacity: int,
        steady: Mapping[str, Array] | None = None,
    ) -> None:
        self.length = 0
        self.capacity = capacity
        self._steady = steady or {}
        self._stepper = decoder.stepper(batch, capacity)
        self._mask = np.ones((batch, capacity), np.int64)
        self._real = np.zeros((batch, 1), np.int64)

    def extend(self, tokens: Array, mask: Array | None = None, *, every: bool = False) -> Array:
        """Append ``tokens`` and return their logits.

        Args:
            tokens: [B, S] int64.
            mask: [B, S], 0 where a row is padding; None where all are real.
            every: Return the logits of all S positions, not of the last one only.

        Returns:
            [B, S or 1, V], valid until the next call.

        Raises:
            UsageError: There is no room for them.
        """
        end = self.length + tokens.shape[1]
        if end > self.capacity:
            raise UsageError(f"{end} tokens exceed the capacity of {self.capacity}")
        positions = self._advance(end, mask)
        self.length = end
        step = Step(tokens, self._mask[:, :end], positions, every, self._steady)
        logits = self._stepper.run(step)
        return logits if every else logits[:, -1:]

    def reorder(self, rows: Sequence[int]) -> None:
        """Let row i go on from where row ``rows[i]`` is; no row may be padded.

        Raises:
            UsageError: What keeps the cache cannot do it.
        """
        if list(rows) == list(range(len(rows))):
            return
        if not isinstance(self._stepper, Reorders):
            raise UsageError("this target does not support beam search; use beams=1")
        self._stepper.reorder(rows, self.length)

    def _advance(self, end: int, mask: Array | None) -> Array:
        """Note which of the new tokens are real and return their positions."""
        if mask is None and end == self.length + 1:  # every step of a generation
            only = self._real
            self._real = only + 1
            return only
        new = self._mask[:, self.length : end]
        if mask is not None:
            new[:] = mask
        positions: Array = self._real + new.cumsum(axis=1) - 1
        self._real = positions[:, -1:] + 1
        # Padding has no position; any valid one will do, because nothing attends to it.
        positions[new == 0] = 0
        return positions


def forced(sequences: Sequences, tokens: Array, mask: Array | None, steps: Iterable[int]) -> Array:
    """Return the logits [B, S, V] of known tokens, whatever the model prefers.

    Args:
        sequences: A batch of no tokens yet.
        tokens: [B, S] int64.
        mask: [B, S], 0 where a row is padding; None where all are real.
        steps: Tokens of each step, S together.
    """
    parts: list[Array] = []
    for start, end in itertools.pairwise(itertools.accumulate(steps, initial=0)):
        real = None if mask is None else mask[:, start:end]
        parts.append(sequences.extend(tokens[:, start:end], real, every=True).copy())
    return np.concatenate(parts, axis=1)


def one_by_one(prefill: int, total: int) -> list[int]:
    """Return how many tokens each step takes: a prefill, and one for each token after it.

    >>> one_by_one(5, 8)
    [5, 1, 1, 1]
    """
    return [prefill] + [1] * (total - prefill)


def _after(old: Array | None, new: Array) -> Array:
    return new if old is None else np.concatenate([old, new], axis=1)
