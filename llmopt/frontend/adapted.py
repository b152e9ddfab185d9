"""References whose inputs and outputs follow a Program that passes have renamed or padded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llmopt.frontend.reference import Reference, Transform
from llmopt.interface.arrays import Arrays
from llmopt.interface.signature import Role, Signature

_NAMED: Final = (Role.TOKENS, Role.MASK, Role.POSITIONS, Role.LOGITS)


def adapted(reference: Reference, before: Signature, after: Signature) -> Reference:
    """Return a reference with the inputs and outputs that passes gave its Program.

    Args:
        reference: The source.
        before: Signature of the Program as traced.
        after: Signature of the Program now.
    """
    names = {
        new.name: old.name
        for old in (*before.inputs, *before.outputs)
        if old.role in _NAMED and (new := after.find(old.role)) is not None
    }
    mask, tokens = after.find(Role.MASK), before.find(Role.TOKENS)
    if mask is not None and tokens is not None and before.find(Role.MASK) is None:
        names |= {mask.name: mask.name}
        reference = PaddedReference(reference, tokens.name, mask.name)
    if any(new != old for new, old in names.items()):
        reference = RenamedReference(reference, names)
    return reference


class RenamedReference:
    """A source whose inputs and outputs have other names in the Program.

    Args:
        reference: The source.
        names: Name in the Program to name in the source.
    """

    def __init__(self, reference: Reference, names: Mapping[str, str]) -> None:
        self._reference = reference
        self._inner = dict(names)
        self._outer = {old: new for new, old in names.items()}

    def run(
        self, batches: Sequence[Arrays], transform: Transform | None = None
    ) -> Iterator[Arrays]:
        """Yield the outputs of each batch, by the Program's names."""
        renamed = [_renamed(batch, self._inner) for batch in batches]
        for outputs in self._reference.run(renamed, transform):
            yield _renamed(outputs, self._outer)


def _renamed(arrays: Arrays, names: Mapping[str, str]) -> Arrays:
    return {names.get(name, name): array for name, array in arrays.items()}


class PaddedReference:
    """A source without a padding mask, for a Program to which a pass added one.

    A row with padding is run alone and without it. Outputs at padding are 0.

    Args:
        reference: The source.
        tokens: Name of the source's input.
        mask: Name of the Program's mask.
    """

    def __init__(self, reference: Reference, tokens: str, mask: str) -> None:
        self._reference = reference
        self._tokens = tokens
        self._mask = mask

    def run(
        self, batches: Sequence[Arrays], transform: Transform | None = None
    ) -> Iterator[Arrays]:
        """Yield the outputs of each batch, [B, S, ...]."""
        parts = [self._parts(batch) for batch in batches]
        outputs = self._reference.run([part for each in parts for part in each], transform)
        for batch, each in zip(batches, parts, strict=True):
            results = [next(outputs) for _ in each]
            real = batch[self._mask] == 1
            yield results[0] if real.all() else _padded(results, real)

    def _parts(self, batch: Arrays) -> list[Arrays]:
        """Return the batch, or each of its rows without padding if a row has any."""
        tokens, real = batch[self._tokens], batch[self._mask] == 1
        if real.all():
            return [{self._tokens: tokens}]
        return [{self._tokens: row[here][None]} for row, here in zip(tokens, real, strict=True)]


def _padded(rows: Sequence[Arrays], real: npt.NDArray[np.bool_]) -> Arrays:
    """Return outputs [B, S, ...] from those of single rows, 0 at padding."""
    outputs: dict[str, npt.NDArray[Any]] = {}
    for name, first in rows[0].items():
        output = np.zeros((*real.shape, *first.shape[2:]), first.dtype)
        for index, row in enumerate(rows):
            output[index, real[index]] = row[name][0]
        outputs[name] = output
    return outputs
