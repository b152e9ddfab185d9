"""Where a pass goes wrong: in which of several components, each run by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from llmopt.errors import LlmoptError
from llmopt.ir import dialect
from llmopt.ir.components import apart
from llmopt.ir.fingerprints import fingerprint
from llmopt.ir.program import Program
from llmopt.passes.base import Pass
from llmopt.passes.pipeline import Pipeline
from llmopt.verification import compare
from llmopt.verification.checks import STEP
from llmopt.verification.trials import Trial, caches, trial_of, trials
from llmopt.verification.values import evaluated


@dataclass(frozen=True)
class FaultyComponent:
    """A Program of one component in which a pass goes wrong.

    Args:
        component: The name of the component; empty where there is no other.
        before: The Program of the component before the pass.
        after: The Program of the component after the pass.
        trial: The inputs that show what is wrong; None where none of one component do.
    """

    component: str
    before: Program
    after: Program
    trial: Trial | None = None


def moved(before: Program, after: Program, trial: Trial, *, exact: bool) -> FaultyComponent | None:
    """Return the first component that computes something else after a pass, if one does.

    Each takes the inputs that it took before the pass, so that none is blamed for what the one
    before it hands over.

    Args:
        before: The Program before the pass.
        after: The Program after the pass.
        trial: Inputs of every component together that show it.
        exact: Whether what is rounded is computed in float32.
    """
    runs = {part.main: evaluated(part, exact=exact) for part in before.parts()}
    feeds = apart(before, runs, trial.feeds)
    for part in _pairs(before, after):
        if not feeds[part.component]:  # there are no images
            continue
        expected = runs[part.component](feeds[part.component])
        own = trial_of(part.before, feeds[part.component])
        try:
            outputs = evaluated(part.after, exact=exact)(own.feeds)
        except LlmoptError:
            outputs = {}
        names = [*caches(part.before)]
        if not outputs or not compare("", outputs, expected, own.tokens, names).error_rel <= STEP:
            return dataclasses.replace(part, trial=dataclasses.replace(own, label=trial.label))
    return None


def broken(item: Pass, before: Program, after: Program, *, exact: bool) -> FaultyComponent | None:
    """Return the first component that a pass fails on, or leaves so that nothing runs."""
    for part in _pairs(before, after):
        if fails(item, part.before.clone()) or unrunnable(part.after, exact=exact):
            return part
    return None


def changed(before: Program, after: Program) -> FaultyComponent | None:
    """Return the component that a pass changed, if it is one alone."""
    parts = [
        part
        for part in _pairs(before, after)
        if fingerprint(part.before) != fingerprint(part.after)
    ]
    return parts[0] if len(parts) == 1 else None


def _pairs(before: Program, after: Program) -> Iterator[FaultyComponent]:
    for old, new in zip(_alone(before), _alone(after), strict=True):
        yield FaultyComponent(old.main, old, new)


def _alone(program: Program) -> list[Program]:
    """Return each component as a Program whose facts are those of what it takes itself."""
    first, *others = program.parts()
    model = program.facts.model
    vocabulary = model.source_vocabulary or model.vocabulary
    limit = model.max_source or model.max_length
    first.learn(model=dataclasses.replace(model, vocabulary=vocabulary, max_length=limit))
    return [first, *others]


def unrunnable(program: Program, *, exact: bool) -> bool:
    """Whether a Program is not in the dialect, or cannot be run."""
    try:
        run = evaluated(program, exact=exact)
        run(trials(program)[0].feeds)
    except LlmoptError:
        return True
    return bool(dialect.verify(program.model))


def fails(item: Pass, program: Program) -> bool | None:
    """Whether a pass leaves no valid Program (True), or fails in another way (False)."""
    try:
        Pipeline((item,)).run(program)
    except LlmoptError:
        return True
    except Exception:  # noqa: BLE001 - passes may take for granted what a part of a model lacks
        return False
    return None
