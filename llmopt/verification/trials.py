"""The inputs that a Program is run on after each pass, and what is compared of its outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llmopt.interface.arrays import Arrays
from llmopt.interface.signature import Role
from llmopt.ir.components import edge
from llmopt.ir.feeds import Case, feeds
from llmopt.ir.images import illustrated
from llmopt.ir.program import Program
from llmopt.verification import Tokens, matrix, source_inputs, tokens_of

PAST: Final = 5
"""Tokens in the caches of random numbers that a Program with caches is run on."""
_LONGEST: Final = 64  # new tokens of a case that is run with a past too


@dataclass(frozen=True, eq=False)
class Trial:
    """One set of inputs.

    Args:
        label: The sizes and padding.
        feeds: An array for every input.
        tokens: The positions of tokens among padding; None if nothing is padded.
        past: Tokens in the cache: the source, which has none, is not run on them.
    """

    label: str
    feeds: Arrays
    tokens: Tokens | None = None
    past: int = 0

    @property
    def size(self) -> tuple[bool, int]:
        """How easy it is to look at: no padding first, then by how many numbers it has."""
        padded = self.tokens is not None and not self.tokens.mask.all()
        return padded, sum(array.size for array in self.feeds.values())


def trials(program: Program) -> list[Trial]:
    """Return the matrix for a Program: batch 1 and 3, lengths, paddings, with and without a past.

    Caches hold random numbers: the Program before a pass is run on the same ones.
    """
    limit = program.facts.max_length or 1 << 20
    cases = [case for case in matrix(program) if not case.past]
    if program.signature.has_cache:
        cases += [
            replace(case, past=PAST, seed=case.seed + 100)
            for case in cases
            if case.new <= _LONGEST and case.new + PAST <= limit
        ]
    vocabulary = program.facts.model.vocabulary or 2
    return [_trial(program, case, vocabulary) for case in cases]


def _trial(program: Program, case: Case, vocabulary: int) -> Trial:
    arrays = feeds(edge(program), case, vocabulary) | source_inputs(program, case)
    arrays = illustrated(program, arrays, case.mask()[:, case.past :], seed=case.seed)
    return Trial(case.label, arrays, tokens_of(case, arrays), case.past)


def trial_of(program: Program, arrays: Mapping[str, npt.NDArray[Any]]) -> Trial:
    """Return the trial of a user's own inputs."""
    mask, tokens = (program.signature.find(role) for role in (Role.MASK, Role.TOKENS))
    past = program.signature.find(Role.PAST_KEY)
    length = 0 if past is None or past.name not in arrays else arrays[past.name].shape[2]
    real = None
    if mask is not None and mask.name in arrays:
        valid = np.asarray(arrays[mask.name]) != 0
        new = valid.shape[1] - length
        if tokens is not None and tokens.name in arrays:
            new = arrays[tokens.name].shape[1]
        real = Tokens(valid, new)
    return Trial("the given inputs", dict(arrays), real, length)


def caches(program: Program) -> Iterator[str]:
    """Yield the names of the outputs that are caches."""
    for port in program.signature.outputs:
        if port.role in (Role.PRESENT_KEY, Role.PRESENT_VALUE):
            yield port.name
