"""Running a Program of two components as if it were one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy.typing as npt

from llmopt.bundle.manifest import handed_over
from llmopt.ir.feeds import Arrays, Case, feeds, taken
from llmopt.ir.program import Program

Run = Callable[[Mapping[str, npt.NDArray[Any]]], Arrays]
FIRST: Final = "encoder."
"""Begins the names of what the first of two components takes."""


def chained(program: Program, runs: Mapping[str, Run]) -> Run:
    """Return one function of all components, from inputs to outputs.

    The inputs of the first component begin with its name; it is run again only when it is given
    other arrays. Its outputs come with those of the second.

    Args:
        program: What inputs and outputs mean.
        runs: What runs each component, by name.
    """
    if len(runs) == 1:
        return runs[program.main]
    first, second = program.signatures
    return _Chain(
        runs[first],
        runs[second],
        handed_over(program.signatures[first], program.signatures[second]),
        frozenset(port.name for port in program.signatures[second].inputs),
    )


class _Chain:
    """Two functions, the second of which takes what the first gives.

    Args:
        first: One function.
        second: The other.
        handed: The inputs of ``second`` that are outputs or inputs of ``first``.
        takes: What ``second`` takes.
    """

    def __init__(
        self, first: Run, second: Run, handed: Mapping[str, str], takes: frozenset[str]
    ) -> None:
        self._first = first
        self._second = second
        self._handed = handed
        self._takes = takes
        self._given: Arrays = {}
        self._found: Arrays = {}

    def __call__(self, given: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        source = starting(given)
        if not self._known(source):
            self._given, self._found = source, self._first(source)
        known = self._given | self._found
        handed = {name: known[origin] for name, origin in self._handed.items()}
        rest = {name: array for name, array in given.items() if name in self._takes}
        return {**self._found, **self._second({**rest, **handed})}

    def _known(self, source: Arrays) -> bool:
        same = self._given.keys() == source.keys() and bool(source)
        return same and all(self._given[name] is array for name, array in source.items())


def apart(
    program: Program, runs: Mapping[str, Run], given: Mapping[str, npt.NDArray[Any]]
) -> dict[str, Arrays]:
    """Return what each of two components takes, by its name, of what the whole is given.

    Args:
        program: What inputs and outputs mean.
        runs: What runs each component; the first is run.
        given: Inputs of both, as `chained` takes them.
    """
    first, second = program.signatures
    source = starting(given)
    known = source | runs[first](source)
    signature = program.signatures[second]
    handed = handed_over(program.signatures[first], signature)
    rest = taken(signature, given)
    return {first: source, second: rest | {name: known[own] for name, own in handed.items()}}


def starting(given: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Return the inputs of the first component, by their own names."""
    return {name.removeprefix(FIRST): a for name, a in given.items() if name.startswith(FIRST)}


def source_feeds(program: Program, case: Case) -> Arrays:
    """Return inputs of the first of two components, as `chained` takes them; none of one alone.

    Args:
        program: What inputs mean.
        case: How many sequences of how many tokens, padded how.
    """
    if len(program.signatures) == 1:
        return {}
    signature = next(iter(program.signatures.values()))
    facts = program.facts.model
    vocabulary = facts.source_vocabulary or facts.vocabulary or 2
    found = feeds(signature, case, vocabulary)
    return {FIRST + name: array for name, array in found.items()}
