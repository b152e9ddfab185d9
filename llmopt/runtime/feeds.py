"""Checking what a user feeds a model by hand, and filling in what follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llmopt.errors import UsageError
from llmopt.interface.arrays import Array
from llmopt.interface.signature import Port, Role
from llmopt.runtime.session import Session


def complete_feeds(session: Session, feeds: Mapping[str, Any]) -> dict[str, Array]:
    """Return ``feeds`` as arrays, with what may be left out filled in.

    Left out may be the mask (all ones) and the positions (counted from the mask) where there is
    no past, the past (none), token types (zeros), images (none), and inputs that have a default in
    the model.

    Raises:
        UsageError: A name is unknown or missing, or an element type, rank or size is wrong.
    """
    unknown = [name for name in feeds if name not in session.inputs]
    if unknown:
        known = ", ".join(session.inputs)
        raise UsageError(f"the model has no input {unknown[0]!r}; its inputs: {known}")
    arrays = {name: np.asarray(value) for name, value in feeds.items()}
    for name, array in arrays.items():
        _check(session.inputs[name], array)
    arrays |= _defaults(session, arrays)
    missing = [n for n, p in session.inputs.items() if n not in arrays and not _optional(p)]
    if missing:
        raise UsageError(f"input {missing[0]!r} is missing: {describe(session.inputs[missing[0]])}")
    _check_letters(session, arrays)
    return arrays


def describe(port: Port) -> str:
    """Return what an input takes, in words.

    >>> describe(Port("input_ids", Role.TOKENS, "int64", ("B", "S")))
    'int64 [B, S]'
    """
    return f"{port.dtype} [{', '.join(map(str, port.shape))}]"


def _optional(port: Port) -> bool:
    return port.role in {Role.LOGITS_TO_KEEP, Role.PIXELS}


def _check(port: Port, array: Array) -> None:
    given = f"{array.dtype} {list(array.shape)}"
    if array.dtype != np.dtype(port.dtype):
        raise UsageError(f"input {port.name!r} takes {describe(port)}, not {given}")
    fits = array.ndim == len(port.shape) and all(
        not isinstance(want, int) or want == have
        for want, have in zip(port.shape, array.shape, strict=True)
    )
    if not fits:
        raise UsageError(f"input {port.name!r} takes {describe(port)}, not {given}")


def _check_letters(session: Session, arrays: Mapping[str, Array]) -> None:
    """Raise where one letter stands for two sizes."""
    seen: dict[str, tuple[str, int]] = {}
    for name, array in arrays.items():
        for letter, size in zip(session.inputs[name].shape, array.shape, strict=True):
            if isinstance(letter, int):
                continue
            first, known = seen.setdefault(letter, (name, size))
            if known != size:
                raise UsageError(
                    f"{letter} is {known} in input {first!r} and {size} in input {name!r}"
                )


def _defaults(session: Session, arrays: Mapping[str, Array]) -> dict[str, Array]:
    tokens_port = session.find(Role.TOKENS)
    if tokens_port is None or tokens_port.name not in arrays:
        return {}
    tokens = arrays[tokens_port.name]
    found = dict(_without_past(session, tokens, arrays))
    return {name: array for name, array in found.items() if name not in arrays}


def _without_past(
    session: Session, tokens: Array, arrays: Mapping[str, Array]
) -> Iterator[tuple[str, Array]]:
    signature = session.signature
    types = session.find(Role.TOKEN_TYPES)
    if types is not None:
        yield types.name, np.zeros(tokens.shape, types.dtype)
    if any(port.name in arrays for port in signature.pasts):
        return
    yield from signature.empty_caches(len(tokens)).items()
    mask_port, positions_port = session.find(Role.MASK), session.find(Role.POSITIONS)
    mask = np.ones(tokens.shape, np.int64)
    if mask_port is not None:
        mask = arrays.get(mask_port.name, mask.astype(mask_port.dtype))
        yield mask_port.name, mask
    if positions_port is not None and mask.shape == tokens.shape:
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        yield positions_port.name, positions.astype(positions_port.dtype)
