"""The state that a Program after a pass is compared with, and the comparisons."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmopt.backends.base import TOLERANCE, Backend, Demand
from llmopt.frontend.adapted import adapted
from llmopt.frontend.reference import Reference
from llmopt.interface.arrays import Arrays, Run
from llmopt.interface.signature import Signature
from llmopt.ir.evaluator import lacking
from llmopt.ir.fingerprints import fingerprint
from llmopt.ir.program import Program
from llmopt.passes.base import Pass
from llmopt.passes.rounding import RoundingPass, rounding_of
from llmopt.verification import comparable, compare, measure, without_caches
from llmopt.verification.checks import BEFORE, SOURCE, STEP, Finding
from llmopt.verification.trials import Trial, caches, trials
from llmopt.verification.values import evaluated

Pairs = Iterable[tuple[Trial, Arrays, Arrays]]
"""Inputs, outputs and the outputs to expect."""


@dataclass(frozen=True)
class Subject:
    """What stays the same while passes run.

    Args:
        source: The source.
        traced: The signature of the Program before any pass.
        inputs: Inputs to use instead of the matrix.
        backend: The backend that the lowering passes belong to.
    """

    source: Reference
    traced: Signature
    inputs: Sequence[Trial] | None = None
    backend: Backend | None = None


@dataclass(frozen=True, eq=False)
class TrialBaseline:
    """The state that the Program after the next pass is compared with.

    Args:
        fingerprint: The digest of the Program.
        reference: The source, with the inputs and outputs that the Program has.
        program: A copy of the Program, as it was last evaluated.
        trials: The inputs.
        outputs: The outputs of the Program for each.
        expected: The outputs of the source for each that it takes: it has no cache.
        rounding: The passes so far that rounded weights.
        unrounded: The Program before the first of them.
    """

    fingerprint: str
    reference: Reference
    program: Program
    trials: Sequence[Trial] = ()
    outputs: Mapping[Trial, Arrays] = field(default_factory=dict)
    expected: Mapping[Trial, Arrays] = field(default_factory=dict)
    rounding: tuple[RoundingPass, ...] = ()
    unrounded: Program | None = None

    @property
    def exact(self) -> bool:
        """Whether what is rounded is computed in float32: once a pass has declared it."""
        return bool(self.rounding)

    @property
    def tolerance(self) -> float:
        """The largest error that is allowed against the source."""
        return max([TOLERANCE, *(each.left for each in self.rounding)])

    @property
    def transform(self) -> Callable[[str, Any], Any] | None:
        """The rounding of the source's weights."""
        return rounding_of(self.rounding, self.unrounded) if self.unrounded else None

    def after(self, item: Pass, program: Program) -> TrialBaseline:
        """Return the state before the comparison with a Program that ``item`` changed.

        The source's weights are rounded as a pass that declares it rounded those of the Program.
        """
        state = replace(self, fingerprint=fingerprint(program))
        if not isinstance(item, RoundingPass):
            return state
        unrounded = self.unrounded
        if unrounded is None:
            unrounded = self.program.clone()
            unrounded.facts = program.facts  # of activations measured meanwhile
        return replace(state, rounding=(*self.rounding, item), unrounded=unrounded)


def traced(subject: Subject, program: Program) -> tuple[tuple[Finding, ...], TrialBaseline]:
    """Return how far a Program is from its source before any pass, and the first baseline."""
    state = TrialBaseline(fingerprint(program), subject.source, program)
    return _settled(subject, state, program, evaluated(program, exact=False))


def compared(
    subject: Subject, state: TrialBaseline, item: Pass, program: Program
) -> tuple[tuple[Finding, ...] | None, TrialBaseline]:
    """Return how far a Program moved in ``item``, and the baseline of the next pass.

    There are no findings, None, where nothing here can run the Program.

    Raises:
        LlmoptError: The Program cannot be run.
    """
    foreign = any(lacking(part.model) for part in program.parts())
    if item.lowers or foreign:  # caches may have another form from here on
        partial = (
            _partially_lowered(subject, program)
            if foreign
            else evaluated(program, exact=state.exact)
        )
        return None if partial is None else _from_source(subject, state, program, partial), state
    run = evaluated(program, exact=state.exact)
    if isinstance(item, RoundingPass) or item.changes_signature:
        reference = adapted(subject.source, subject.traced, program.signature)
        return _settled(subject, replace(state, reference=reference), program, run)
    return _moved(state, program, run)


def _partially_lowered(subject: Subject, program: Program) -> Run | None:
    """Return what runs a Program that is lowered in part, where the backend does."""
    backend = subject.backend
    if backend is None or len(program.components) > 1:
        return None
    if (part := backend.partially_lowered(program.clone())) is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        lowered = backend.write(part, Path(folder), Demand())
        return backend.open(Path(folder) / lowered.entry, exact=True)


def _settled(
    subject: Subject, state: TrialBaseline, program: Program, run: Run
) -> tuple[tuple[Finding, ...], TrialBaseline]:
    """Compare with the source alone; what is computed from now on is compared with this."""
    findings = _from_source(subject, state, program, run)
    every = trials(program) if subject.inputs is None else subject.inputs
    full = [trial for trial in every if not trial.past]
    batches = [without_caches(program, trial.feeds) for trial in full]
    expected = dict(zip(full, state.reference.run(batches, state.transform), strict=True))
    outputs = {trial: run(trial.feeds) for trial in every}
    if subject.inputs is not None:
        pairs = [(trial, outputs[trial], right) for trial, right in expected.items()]
        findings = tuple(_findings(program, pairs, SOURCE, state.tolerance))
    state = replace(state, program=program.clone(), trials=every, outputs=outputs)
    return findings, replace(state, expected=expected)


def _from_source(
    subject: Subject, state: TrialBaseline, program: Program, run: Run
) -> tuple[Finding, ...]:
    """Compare on the matrix, through the cache too; not on inputs of the user's."""
    if subject.inputs is not None:
        return ()
    cases = measure(program, run, state.reference, state.transform)
    return tuple(Finding(SOURCE, each, state.tolerance) for each in cases)


def _moved(
    state: TrialBaseline, program: Program, run: Run
) -> tuple[tuple[Finding, ...], TrialBaseline]:
    """Compare with the Program before, and with the source, on the same inputs."""
    outputs = {trial: run(trial.feeds) for trial in state.trials}
    before = [(trial, outputs[trial], state.outputs[trial]) for trial in state.trials]
    source = [(trial, outputs[trial], right) for trial, right in state.expected.items()]
    findings = (
        *_findings(program, before, BEFORE, STEP),
        *_findings(program, source, SOURCE, state.tolerance),
    )
    return findings, replace(state, program=program.clone(), outputs=outputs)


def _findings(program: Program, pairs: Pairs, against: str, tolerance: float) -> Iterator[Finding]:
    cached = [*caches(program)]
    for trial, actual, wanted in pairs:
        if expected := comparable(program.signature, wanted, trial.tokens):
            error = compare(trial.label, actual, expected, trial.tokens, cached)
            yield Finding(against, error, tolerance, trial)
