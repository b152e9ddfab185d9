"""Passes that change weights on purpose, so that the source can be rounded the same way."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt

from llmopt.ir.program import Program
from llmopt.passes.base import Pass

Rounding = Callable[[str, npt.NDArray[Any]], npt.NDArray[Any]]
"""Returns a parameter of the source as it is after rounding, from its name and value."""


class RoundingPass(Pass):
    """A pass after which some weights are others: the nearest that a narrower type has.

    Verification rounds the source in the same way, so that what it finds is what went wrong, not
    what was meant.
    """

    @property
    def left(self) -> float:
        """Relative error of outputs that is left where the source is rounded in the same way."""
        return 0.0

    @abc.abstractmethod
    def rounding(self, program: Program, after: Rounding) -> Rounding:
        """Return what running this pass on ``program``, which is left as it is, does to weights.

        Args:
            program: Program as the pass would receive it.
            after: Rounding of later passes, for weights that this one leaves alone.
        """


def rounding_of(passes: Sequence[Pass], program: Program) -> Rounding | None:
    """Return what ``passes`` do to the weights of ``program``; None if they leave all alone."""
    found = [each for each in passes if isinstance(each, RoundingPass)]
    if not found:
        return None
    rounding: Rounding = _unchanged
    for each in reversed(found):
        for part in program.parts():
            rounding = each.rounding(part, rounding)
    return rounding


def _unchanged(_: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array
