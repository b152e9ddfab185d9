"""Running a decoder step by step: one class for each way an artifact keeps its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from llmopt.bundle.manifest import Port
from llmopt.errors import UsageError
from llmopt.runtime.session import Array, Session, aligned_zeros


@dataclass(frozen=True)
class Step:
    """What one call of a decoder takes.

    Args:
        tokens: [B, S] int64, the new tokens.
        mask: [B, T] int64, 1 where a token is real, for past and new tokens.
        positions: [B, S] int64.
        every: Whether logits of all S positions are wanted, or of the last one only.
    """

    tokens: Array
    mask: Array
    positions: Array
    every: bool

    def feeds(self, session: Session) -> dict[str, Array]:
        """Return the inputs that this model has, by name."""
        by_role = {
            "tokens": self.tokens,
            "mask": self.mask,
            "positions": self.positions,
            "token_types": np.zeros_like(self.tokens),
            "logits_to_keep": np.array(0 if self.every else 1, np.int64),
        }
        ports = ((array, session.find(role)) for role, array in by_role.items())
        return {
            port.name: np.ascontiguousarray(array, port.dtype).reshape(array.shape)
            for array, port in ports
            if port is not None
        }


class Stepper(Protocol):
    """A decoder with a memory of the steps before."""

    def run(self, step: Step) -> Array:
        """Return logits [B, K, V]; the array is overwritten by the next run."""


class SharedCache:
    """Past and present are one buffer per layer, which the model writes in place.

    Args:
        session: The model.
        batch: B.
        capacity: Most tokens a row can come to.
    """

    def __init__(self, session: Session, batch: int, capacity: int) -> None:
        self._session = session
        self._binding = session.bind()
        self._logits = session.need("logits")
        self._mask_memory = np.ones(batch * capacity, np.int64)
        self._fast: _OneToken | None = None
        for past, present in _cache_pairs(session):
            shape = cache_shape(past, batch, capacity)
            self._binding.share(past.name, present.name, aligned_zeros(shape, past.dtype))

    def run(self, step: Step) -> Array:
        """Return logits [B, K, V]; the array is overwritten by the next run."""
        if step.tokens.shape[1] == 1:
            return self._run_one(step)
        self._fast = None
        self._bind(step.feeds(self._session))
        if step.every and self._session.find("logits_to_keep") is not None:
            # the artifact declares logits of one token, and a bound output must be as declared
            self._binding.allocate(self._logits.name)
            self._binding.run()
            return self._binding.allocated(self._logits.name)
        logits = self._fetch_logits(step)
        self._binding.run()
        return logits

    def _run_one(self, step: Step) -> Array:
        """Run a step of one token: buffers stay bound, and only the growing mask is bound anew."""
        mask = self._mask_memory[: step.mask.size].reshape(step.mask.shape)
        mask[...] = step.mask
        if self._fast is None:
            # These are written to below, so they must not be the caller's.
            feeds = {name: array.copy() for name, array in step.feeds(self._session).items()}
            self._bind(feeds)
            self._fast = _OneToken.of(self._session, feeds, self._fetch_logits(step))
        self._fast.tokens[...] = step.tokens
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
        free = new if step.every or self._session.find("logits_to_keep") is None else 1
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

    tokens: Array
    positions: Array | None
    mask_name: str
    logits: Array

    @classmethod
    def of(cls, session: Session, feeds: dict[str, Array], logits: Array) -> _OneToken:
        positions = session.find("positions")
        return cls(
            tokens=feeds[session.need("tokens").name],
            positions=None if positions is None else feeds[positions.name],
            # Without a mask the model could not tell how much of the buffer is in use.
            mask_name=session.need("mask").name,
            logits=logits,
        )


class ConcatCache:
    """Present is past and the new tokens, another tensor at each step.

    Args:
        session: The model.
        batch: B.
    """

    def __init__(self, session: Session, batch: int) -> None:
        self._session = session
        self._pairs = _cache_pairs(session)
        self._names = [session.need("logits").name, *(present.name for _, present in self._pairs)]
        self._cache: dict[str, Any] = {
            past.name: session.value(np.zeros(cache_shape(past, batch, 0), past.dtype))
            for past, _ in self._pairs
        }

    def run(self, step: Step) -> Array:
        """Return logits [B, K, V]."""
        session = self._session
        feeds = {name: session.value(array) for name, array in step.feeds(session).items()}
        logits, *presents = session.run_values(self._cache | feeds, self._names)
        pasts = (past.name for past, _ in self._pairs)
        self._cache = dict(zip(pasts, presents, strict=True))
        return np.asarray(logits.numpy())


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
    """

    def __init__(self, session: Session, batch: int, capacity: int) -> None:
        self.length = 0
        self.capacity = capacity
        self._stepper = make_stepper(session, batch, capacity)
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
        step = Step(tokens, self._mask[:, :end], positions, every)
        logits = self._stepper.run(step)
        return logits if every else logits[:, -1:]

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


def make_stepper(session: Session, batch: int, capacity: int) -> Stepper:
    """Return the way of stepping that the artifact's manifest asks for."""
    match session.manifest.model.cache:
        case "shared":
            return SharedCache(session, batch, capacity)
        case "concat":
            return ConcatCache(session, batch)
        case "none":
            return NoCache(session)


def cache_shape(port: Port, batch: int, length: int) -> tuple[int, ...]:
    """Return the shape [B, G, length, D] of a cache input whose batch and length are free."""
    _, heads, _, width = port.shape
    if not (isinstance(heads, int) and isinstance(width, int)):
        raise UsageError(f"{port.name}: the manifest leaves heads or width of the cache open")
    return batch, heads, length, width


def _cache_pairs(session: Session) -> list[tuple[Port, Port]]:
    pairs: list[tuple[Port, Port]] = []
    for part in ("key", "value"):
        pasts, presents = session.layered(f"past_{part}"), session.layered(f"present_{part}")
        pairs += zip(pasts, presents, strict=True)
    return pairs


def _after(old: Array | None, new: Array) -> Array:
    return new if old is None else np.concatenate([old, new], axis=1)
