"""Sentences to vectors: padded batches of like lengths, and pooling where the model has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np

from llmopt.errors import UsageError
from llmopt.interface.arrays import Array
from llmopt.interface.signature import Role
from llmopt.runtime.generation import padding_token
from llmopt.runtime.session import Session
from llmopt.runtime.tokenizer import pad


def embed_rows(session: Session, rows: Sequence[Sequence[int]], batch_size: int) -> Array:
    """Return the embedding of each row of tokens: [N, E] float32, in the order given.

    Raises:
        UsageError: The artifact makes no embeddings, or ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size {batch_size} is below 1")
    check_embeds(session)
    found: list[Array] = [np.empty(0)] * len(rows)
    for numbers in batches([len(row) for row in rows], batch_size):
        part = _embed(session, [rows[i] for i in numbers])
        for i, row in zip(numbers, part, strict=True):
            found[i] = row
    width = session.manifest.model.hidden
    return np.stack(found) if found else np.zeros((0, width), np.float32)


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield the places of rows of like lengths, ``size`` at a time, longest first.

    >>> list(batches([3, 9, 4], 2))
    [[1, 2], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def check_embeds(session: Session) -> None:
    """Raise unless the artifact can make embeddings.

    Raises:
        UsageError: It has no embedding output, and no hidden states with a known pooling.
    """
    if session.find(Role.EMBEDDING) is not None:
        return
    pooling = session.manifest.model.pooling
    if session.find(Role.HIDDEN) is None or pooling not in POOLINGS:
        raise UsageError(
            f"this artifact computes no embeddings, it is for {session.manifest.task!r}; "
            "compile a sentence encoder with --task embed"
        )


def _embed(session: Session, rows: Sequence[Sequence[int]]) -> Array:
    facts = session.manifest.model
    tokens, mask = pad(rows, padding_token(facts.pad, ()), "right")
    by_role = {Role.TOKENS: tokens, Role.MASK: mask, Role.TOKEN_TYPES: np.zeros_like(tokens)}
    feeds = {
        port.name: array.astype(port.dtype)
        for role, array in by_role.items()
        if (port := session.find(role)) is not None
    }
    output = session.find(Role.EMBEDDING) or session.need(Role.HIDDEN)
    result: Array = session.run(feeds, [output.name])[output.name].astype(np.float32)
    return result if output.role == Role.EMBEDDING else POOLINGS[str(facts.pooling)](result, mask)


def _mean(hidden: Array, mask: Array) -> Array:
    total: Array = _sum(hidden, mask) / _count(mask)
    return total


def _mean_sqrt_len(hidden: Array, mask: Array) -> Array:
    total: Array = _sum(hidden, mask) / np.sqrt(_count(mask))
    return total


def _max(hidden: Array, mask: Array) -> Array:
    best: Array = np.where(mask[..., None] > 0, hidden, -np.inf).max(axis=1)
    return best


def _first(hidden: Array, _mask: Array) -> Array:
    return hidden[:, 0]


def _last(hidden: Array, mask: Array) -> Array:
    last: Array = hidden[np.arange(len(hidden)), mask.sum(axis=1) - 1]
    return last


def _sum(hidden: Array, mask: Array) -> Array:
    total: Array = (hidden * mask[..., None].astype(np.float32)).sum(axis=1)
    return total


def _count(mask: Array) -> Array:
    count: Array = mask.sum(axis=1, keepdims=True).astype(np.float32)
    return count


POOLINGS: Final[Mapping[str, Callable[[Array, Array], Array]]] = {
    "mean": _mean,
    "mean_sqrt_len": _mean_sqrt_len,
    "max": _max,
    "cls": _first,
    "last": _last,
}
"""How hidden [B, S, E] and mask [B, S] become [B, E], by the manifest's name for it."""
