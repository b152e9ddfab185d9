"""Running a Program of several components as if it were one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llmopt.interface.arrays import Arrays, Run
from llmopt.interface.signature import FORWARDED, Port, Role, Signature, forwarded
from llmopt.ir.feeds import Case, feeds
from llmopt.ir.program import Program

ENCODER: Final = "encoder"
FIRST: Final = f"{ENCODER}."
"""Begins the names of what an encoder takes beside a decoder, which takes others of these names."""
PIXELS: Final = "pixel_values"
"""What images are called where a model sees any."""


def chained(program: Program, runs: Mapping[str, Run]) -> Run:
    """Return one function of all components, from inputs to outputs.

    Each takes what the one before it gives. The inputs of an encoder begin with its name; the first
    component is run again only when it is given other arrays, and not at all when it is given
    none: images may be left out. All outputs come together.

    Args:
        program: Program that gives inputs and outputs their meaning.
        runs: Run of each component, by name.
    """
    if len(runs) == 1:
        return runs[program.main]
    return _Chain(_links(program, runs))


def apart(
    program: Program, runs: Mapping[str, Run], feeds: Mapping[str, npt.NDArray[Any]]
) -> dict[str, Arrays]:
    """Return what each of several components takes, by its name, of what the whole is given.

    Args:
        program: Program that gives inputs and outputs their meaning.
        runs: Run of each component; all but the last are run.
        feeds: Inputs of all, as `chained` takes them; nothing of a component that is left out.
    """
    taken: dict[str, Arrays] = {}
    known: Arrays = {}
    for name, link in zip(program.signatures, _links(program, runs), strict=True):
        taken[name] = inputs = link.inputs(feeds, known)
        if inputs and name != program.main:
            known = inputs | link.run(inputs)
    return taken


def edge(program: Program) -> Signature:
    """Return what goes into a Program in every step, and what comes out of its main component.

    What one component hands to another is not there, nor are images; of an encoder and a decoder
    it is what the decoder takes.
    """
    if ENCODER in program.signatures or len(program.signatures) == 1:
        return program.signature
    inputs = [
        port
        for signature in program.signatures.values()
        for port in signature.inputs
        if port.role not in FORWARDED and port.role != Role.PIXELS
    ]
    return Signature(tuple(inputs), program.signature.outputs)


def is_steady(name: str) -> bool:
    """Whether an input is the same in every step: what is read first, and images."""
    return name.startswith(FIRST) or name == PIXELS


def _links(program: Program, runs: Mapping[str, Run]) -> list[_Link]:
    links: list[_Link] = []
    before = Signature()
    for name, signature in program.signatures.items():
        prefix = FIRST if name == ENCODER else ""
        links.append(_Link(runs[name], signature, prefix, forwarded(before, signature)))
        before = signature
    return links


@dataclass(frozen=True)
class _Link:
    """One component of a chain.

    Args:
        run: Run of the component.
        signature: Signature of the component.
        prefix: Begins the names of its inputs, as the chain takes them.
        handed: The inputs that are outputs or inputs of the one before it.
    """

    run: Run
    signature: Signature
    prefix: str
    handed: Mapping[str, str]

    def inputs(self, feeds: Mapping[str, npt.NDArray[Any]], known: Arrays) -> Arrays:
        """Return what it takes, by its own names; nothing where it is given nothing.

        Args:
            feeds: Inputs of the chain.
            known: Inputs and outputs of the component before it.
        """
        own = {p.name: self.prefix + p.name for p in self.signature.inputs}
        taken = {n: feeds[outer] for n, outer in own.items() if outer in feeds}
        if not taken:
            return {}
        ports = {port.name: port for port in self.signature.inputs}
        handed = {n: known.get(o, _nothing(ports[n])) for n, o in self.handed.items()}
        return taken | handed


def _nothing(port: Port) -> npt.NDArray[Any]:
    """Return what stands for an input that nobody gives: features of no images."""
    return np.zeros([n if isinstance(n, int) else 0 for n in port.shape], port.dtype)


class _Chain:
    """Functions, each of which takes what the one before it gives.

    Args:
        links: Components in the order they run.
    """

    def __init__(self, links: Sequence[_Link]) -> None:
        self._links = links
        self._given: Arrays = {}
        self._first: Arrays = {}

    def __call__(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        known: Arrays = {}
        every: Arrays = {}
        for place, link in enumerate(self._links):
            inputs = link.inputs(feeds, known)
            found = self._remembered(link, inputs) if place == 0 else link.run(inputs)
            known = inputs | found
            every |= found
        return every

    def _remembered(self, link: _Link, inputs: Arrays) -> Arrays:
        """Return what the first component gives, run only for arrays that are new to it."""
        if not inputs:
            return {}
        same = self._given.keys() == inputs.keys()
        if not (same and all(self._given[name] is array for name, array in inputs.items())):
            self._given, self._first = inputs, link.run(inputs)
        return self._first


def source_feeds(program: Program, case: Case) -> Arrays:
    """Return inputs of an encoder, as `chained` takes them; none where there is no encoder.

    Args:
        program: Program that gives inputs their meaning.
        case: Number of sequences, their length and padding.
    """
    if ENCODER not in program.signatures:
        return {}
    facts = program.facts.model
    vocabulary = facts.source_vocabulary or facts.vocabulary or 2
    found = feeds(program.signatures[ENCODER], case, vocabulary)
    return {FIRST + name: array for name, array in found.items()}
