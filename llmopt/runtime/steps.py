"""Running a decoder step by step, whatever keeps its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from llmopt.errors import UsageError
from llmopt.interface.arrays import Array
from llmopt.interface.signature import Port
from llmopt.runtime.session import Session


@dataclass(frozen=True)
class Step:
    """What one call of a decoder takes.

    Args:
        tokens: [B, S] int64, the new tokens.
        mask: [B, T] int64, 1 where a token is real, for past and new tokens.
        positions: [B, S] int64.
        every: Whether logits of all S positions are wanted, or of the last one only.
        given: Inputs that are the same in every step: what a model that reads has made of it.
        embeds: [B, S, E], of the tokens, where the model takes those.
    """

    tokens: Array
    mask: Array
    positions: Array
    every: bool
    given: Mapping[str, Array] = field(default_factory=dict)
    embeds: Array | None = None

    @property
    def entering(self) -> tuple[str, Array]:
        """The role and the numbers of what the first layer is made of."""
        return ("tokens", self.tokens) if self.embeds is None else ("embeds", self.embeds)

    def feeds(self, session: Session) -> dict[str, Array]:
        """Return the inputs that this model has, by name."""
        role, entering = self.entering
        by_role = {
            role: entering,
            "mask": self.mask,
            "positions": self.positions,
            "token_types": np.zeros_like(self.tokens),
            "logits_to_keep": np.array(0 if self.every else 1, np.int64),
        }
        ports = ((array, session.find(role)) for role, array in by_role.items())
        found = {
            port.name: np.ascontiguousarray(array, port.dtype).reshape(array.shape)
            for array, port in ports
            if port is not None
        }
        return {**found, **self.given}


class Stepper(Protocol):
    """A decoder with a memory of the steps before."""

    def run(self, step: Step) -> Array:
        """Return logits [B, K, V]; the array is overwritten by the next run."""


@runtime_checkable
class Reorders(Protocol):
    """A decoder whose memory can be given to other rows."""

    def reorder(self, rows: Sequence[int], length: int) -> None:
        """Let row i go on from what row ``rows[i]`` remembers.

        Args:
            rows: [B].
            length: How many tokens are remembered.
        """


class NoCache:
    """The model has no cache: every step runs the whole prefix again.

    Args:
        session: The model.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._tokens: Array | None = None
        self._positions: Array | None = None

    def run(self, step: Step) -> Array:
        """Return logits [B, K, V]."""
        new = step.tokens.shape[1]
        self._tokens = _after(self._tokens, step.tokens)
        self._positions = _after(self._positions, step.positions)
        whole = Step(self._tokens, step.mask, self._positions, every=step.every or new > 1)
        name = self._session.need("logits").name
        logits = self._session.run(whole.feeds(self._session), [name])[name]
        return logits[:, -new:]


class Sequences:
    """A batch of token sequences that grow together.

    Args:
        session: The model.
        batch: B.
        capacity: Most tokens a row can come to.
        given: Inputs that are the same in every step.
    """

    def __init__(
        self,
        session: Session,
        batch: int,
        capacity: int,
        given: Mapping[str, Array] | None = None,
    ) -> None:
        self.length = 0
        self.capacity = capacity
        self._given = given or {}
        self._target = session.manifest.target
        self._stepper = session.stepper(batch, capacity)
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
            raise UsageError(f"{end} tokens do not fit: there is room for {self.capacity}")
        positions = self._place(end, mask)
        self.length = end
        step = Step(tokens, self._mask[:, :end], positions, every, self._given)
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
            raise UsageError(f"{self._target} cannot follow several beams; use one")
        self._stepper.reorder(rows, self.length)

    def _place(self, end: int, mask: Array | None) -> Array:
        """Note which of the new tokens are real and return their positions."""
        if mask is None and end == self.length + 1:  # every step of a generation
            positions = self._real
            self._real = positions + 1
            return positions
        if mask is not None:
            self._mask[:, self.length : end] = mask
        positions = self._real + self._mask[:, self.length : end].cumsum(axis=1) - 1
        self._real = positions[:, -1:] + 1
        # Padding in front has no position; any valid one will do, because nothing attends to it.
        placed: Array = np.maximum(positions, 0)
        return placed


def forced(sequences: Sequences, tokens: Array, mask: Array, prefill: int) -> Array:
    """Return the logits [B, S, V] float32 of tokens that are given, whatever the model prefers.

    Args:
        sequences: Of no tokens yet.
        tokens: [B, S] int64.
        mask: [B, S], 0 where a row is padding.
        prefill: How many go in the first step; the rest follow one by one.

    Raises:
        UsageError: The model gives fewer logits than it is given tokens.
    """
    ends = range(prefill, tokens.shape[1] + 1)
    parts: list[Array] = []
    for start, end in zip([0, *ends], ends, strict=False):
        step = slice(start, end)
        part = sequences.extend(tokens[:, step], mask[:, step], every=True)
        if part.shape[1] != end - start:
            raise UsageError("the model gives logits of its last token only; pass prefill=1")
        parts.append(part.astype(np.float32))
    return np.concatenate(parts, axis=1)


def cache_shape(port: Port, batch: int, length: int) -> tuple[int, ...]:
    """Return the shape [B, G, length, D] of a cache input whose batch and length are free."""
    _, heads, _, width = port.shape
    if not (isinstance(heads, int) and isinstance(width, int)):
        raise UsageError(f"{port.name}: the manifest leaves heads or width of the cache open")
    return batch, heads, length, width


def cache_pairs(session: Session) -> list[tuple[Port, Port]]:
    """Return the input and the output of every cache: keys by layer, then values by layer."""
    pairs: list[tuple[Port, Port]] = []
    for part in ("key", "value"):
        pasts, presents = session.layered(f"past_{part}"), session.layered(f"present_{part}")
        pairs += zip(pasts, presents, strict=True)
    return pairs


def _after(old: Array | None, new: Array) -> Array:
    return new if old is None else np.concatenate([old, new], axis=1)
