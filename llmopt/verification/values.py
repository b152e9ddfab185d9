"""Values in the midst of a graph: computed by name, compared, and the first of two that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from llmopt.backends.reference import runner
from llmopt.errors import LlmoptError
from llmopt.interface.arrays import Array, Arrays, Run
from llmopt.ir.components import chained
from llmopt.ir.program import Program
from llmopt.verification import Compared
from llmopt.verification.checks import STEP
from llmopt.verification.trials import Trial


def evaluated(program: Program, *, exact: bool) -> Run:
    """Return a function from inputs to outputs of a Program, operator by operator.

    Args:
        program: The Program; it is not changed.
        exact: Whether what it rounds is computed in float32.

    Raises:
        LlmoptError: An operator has no implementation.
    """
    return chained(program, {p.main: runner(p.model, exact=exact) for p in program.parts()})


def first_difference(
    before: Program, after: Program, trial: Trial, *, exact: bool
) -> Compared | None:
    """Return the first value that both Programs have and that differs, in the order of the second.

    Only what is computed of tokens that are no padding counts, as far as shapes say.
    """
    old, new = (_computed(of) for of in (before, after))
    names = [name for name in new if name in old]
    try:
        left, right = (values(of, trial.feeds, names, exact=exact) for of in (before, after))
    except LlmoptError:
        return None
    for name in names:
        error = error_of(right[name], left[name], trial)
        if not error <= STEP:
            return Compared(trial.label, name, error)
    return None


def _computed(program: Program) -> list[str]:
    return [str(v.name) for n in program.graph for v in n.outputs if v.name and v.type is not None]


def error_of(actual: Array, expected: Array, trial: Trial) -> float:
    """Return how far a value is off where there are tokens, as far as its shape says."""
    if actual.shape != expected.shape:
        return float("inf")
    pair = [actual, expected]
    if trial.tokens is not None:
        pair = [trial.tokens.of(each, cache=False) for each in pair]
    return distance(*pair)


def distance(actual: Array, expected: Array) -> float:
    """Return ``max|actual - expected| / max|expected|`` of any two arrays of a shape.

    What is infinite, as masks are, or no number in both is the same; in one alone, it is not.
    """
    left, right = (np.asarray(each).astype(np.float64) for each in (actual, expected))
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(left - right))
    scale = float(np.max(np.abs(right), where=np.isfinite(right), initial=0.0)) or 1.0
    error = float(np.max(apart, initial=0.0)) / scale
    return error if np.isfinite(error) else float("inf")


def values(
    program: Program, feeds: Mapping[str, Array], names: Sequence[str], *, exact: bool
) -> Arrays:
    """Return any values of a Program by name, computed of ``feeds``."""
    copy = program.clone()
    known = {str(v.name): v for node in copy.graph for v in node.outputs}
    outputs = {value.name for value in copy.graph.outputs}
    copy.graph.outputs.extend(known[name] for name in names if name not in outputs)
    arrays = evaluated(copy, exact=exact)(feeds)
    return {name: arrays[name] for name in names}
