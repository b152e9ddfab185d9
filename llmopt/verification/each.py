"""After each pass: the Program, the Program before the pass and the source on the same inputs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from llmopt.backends.base import TOLERANCE, Backend, Demand
from llmopt.backends.reference import runner
from llmopt.errors import AccuracyError, LlmoptError, PassError
from llmopt.frontend.adapted import adapted
from llmopt.frontend.reference import Reference
from llmopt.interface.arrays import Arrays, Run
from llmopt.interface.signature import Signature
from llmopt.ir.components import chained
from llmopt.ir.evaluator import lacking
from llmopt.ir.program import Program
from llmopt.passes.base import Pass
from llmopt.passes.pipeline import Ran
from llmopt.passes.rounding import RoundingPass, rounding_of
from llmopt.verification import Compared, compare, measure, told_of, without_caches
from llmopt.verification.difference import fingerprint
from llmopt.verification.trials import Trial, caches, trials

STEP: Final = 1e-4
"""Relative error of one pass against the Program before it: float32 sums in another order."""
BEFORE: Final = "the Program before it"
SOURCE: Final = "the source"
TRACE: Final = "trace"
ELSEWHERE: Final = "proven with the artifact"
_REPORT: Final = "report it with the source; --verify off compiles it unproven"


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Args:
        against: ``BEFORE`` or ``SOURCE``.
        compared: The case and how far off it was.
        tolerance: What it had to keep.
        trial: The inputs, where it was one run; None for decoding step by step.
    """

    against: str
    compared: Compared
    tolerance: float
    trial: Trial | None = None

    @property
    def wrong(self) -> bool:
        """Whether it is further off than is allowed, or no number."""
        return not self.compared.error_rel <= self.tolerance


def plain(error_rel: float) -> float | None:
    """Return an error in two digits, None for one that is no number, which JSON has none for."""
    return float(f"{error_rel:.2g}") if np.isfinite(error_rel) else None


@dataclass(frozen=True)
class Checked:
    """What was found after one pass.

    Args:
        name: The pass; ``TRACE`` is what every pass starts from.
        findings: Every comparison.
        duration_s: Seconds that they took.
        problem: Why the Program cannot be run, if it cannot.
        note: Why nothing was compared, if nothing was.
    """

    name: str
    findings: tuple[Finding, ...] = ()
    duration_s: float = 0.0
    problem: str = ""
    note: str = ""

    @property
    def wrong(self) -> list[Finding]:
        """Every comparison that failed."""
        return [each for each in self.findings if each.wrong]

    def worst(self, against: str) -> Finding | None:
        """Return the comparison that was furthest off."""
        found = [each for each in self.findings if each.against == against]
        return max(found, key=lambda each: each.compared.error_rel, default=None)

    def summary(self) -> dict[str, Any]:
        """Return what ``--json`` shows: the worst error against each, or why there is none.

        An error that is no number, of a wrong shape or of NaN, is None.
        """
        found: dict[str, Any] = {"check_s": round(self.duration_s, 3)}
        for key, against in (("before", BEFORE), ("source", SOURCE)):
            if (worst := self.worst(against)) is not None:
                case = f"{worst.compared.label} {worst.compared.output}"
                found[key] = {"error_rel": plain(worst.compared.error_rel), "case": case}
        return found | ({"note": self.note or self.problem} if self.note or self.problem else {})

    def require(self) -> None:
        """Raise if something is wrong.

        Raises:
            PassError: The Program cannot be run after the pass.
            AccuracyError: It computes something else than before, or than the source.
        """
        if self.problem:
            raise PassError(self.name, self.problem)
        if not self.wrong:
            return
        worst = max(self.wrong, key=lambda each: each.compared.error_rel / each.tolerance)
        found = worst.compared
        what, hint = (
            (f"pass {self.name!r} changed what the Program computes", _without(self.name))
            if self.name != TRACE
            else ("before any pass, the traced Program is not what its source computes", _REPORT)
        )
        where = f"at {found.label}: error of {found.output!r} against {worst.against}"
        raise AccuracyError(f"{what}, {where}", found.error_rel, worst.tolerance, hint)


def _without(name: str) -> str:
    return (
        "`llmopt bisect` finds the rewrite and writes an example; "
        f"--passes 'default,-{name}' compiles without it"
    )


def evaluated(program: Program, *, exact: bool) -> Run:
    """Return a function from inputs to outputs of a Program, operator by operator.

    Args:
        program: It is not changed.
        exact: Compute in float32 what it rounds.

    Raises:
        LlmoptError: An operator has no implementation.
    """
    return chained(program, {p.main: runner(p.model, exact=exact) for p in program.parts()})


class Watch:
    """Remembers what a Program computed, and compares what it computes after a pass.

    A pass that declares that it rounds weights (``RoundingPass``) or changes the signature is
    compared with the source alone, whose weights are rounded in the same way; activations are then
    computed in float32, here and after later passes. Operators that the evaluator does not know are
    run by the backend, where that runs what is lowered in part; else they are left to the proof of
    the artifact.

    Args:
        reference: The source.
        given: Inputs to use instead of the matrix.
        backend: What the lowering passes belong to.

    Attributes:
        checks: What was found, pass by pass.
    """

    def __init__(
        self,
        reference: Reference,
        given: Sequence[Trial] | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.checks: list[Checked] = []
        self._source = self._reference = reference
        self._traced = Signature()
        self._given = given
        self._backend = backend
        self._rounding: tuple[RoundingPass, ...] = ()
        self._before: Program | None = None
        self._unrounded: Program | None = None
        self._text = ""
        self._trials: Sequence[Trial] = ()
        self._outputs: dict[Trial, Arrays] = {}
        self._wanted: dict[Trial, Arrays] = {}

    def forked(self, backend: Backend | None = None) -> Watch:
        """Return a watch that goes on from here, with the passes of one backend."""
        other = Watch(self._source, self._given, backend)
        own = {"checks": list(self.checks), "_outputs": dict(self._outputs), "_backend": backend}
        vars(other).update(vars(self) | own)
        return other

    def start(self, program: Program) -> Checked:
        """Compare the traced Program with its source, before any pass."""
        start = time.perf_counter()
        self._text, self._traced = fingerprint(program), program.signature
        findings = self._settle(program, self._evaluated(program))
        return self._told(Checked(TRACE, findings, time.perf_counter() - start))

    def __call__(self, item: Pass, program: Program, _: Ran) -> None:
        """Compare what the Program computes after ``item``; a hook of ``Pipeline.run``.

        Raises:
            PassError: It cannot be run.
            AccuracyError: It computes something else.
        """
        self.judge(item, program).require()

    def judge(self, item: Pass, program: Program) -> Checked:
        """Return how far the Program moved in ``item``, which has just run."""
        start = time.perf_counter()
        text = fingerprint(program)
        if text == self._text:
            return self._told(Checked(item.name, note="it changed nothing"))
        self._text = text
        if isinstance(item, RoundingPass):
            self._declare(item, program)
        try:
            findings = self._found(item, program)
        except LlmoptError as error:
            return self._told(Checked(item.name, problem=f"it cannot be run: {error}"))
        note = "" if findings is not None else ELSEWHERE
        spent = time.perf_counter() - start
        return self._told(Checked(item.name, tuple(findings or ()), spent, note=note))

    def _declare(self, item: RoundingPass, program: Program) -> None:
        """Let the source's weights be rounded as ``item`` rounded those of the Program."""
        if self._unrounded is None and self._before is not None:
            self._unrounded = self._before.clone()
            self._unrounded.facts = program.facts  # of activations measured meanwhile
        self._rounding = (*self._rounding, item)

    def _told(self, checked: Checked) -> Checked:
        self.checks.append(checked)
        return checked

    def _found(self, item: Pass, program: Program) -> tuple[Finding, ...] | None:
        foreign = any(lacking(part.model) for part in program.parts())
        if item.lowers or foreign:  # caches may have another form from here on
            lowered = self._partly(program) if foreign else self._evaluated(program)
            return None if lowered is None else self._against_source(program, lowered)
        run = self._evaluated(program)
        if isinstance(item, RoundingPass) or item.changes_signature:
            self._reference = adapted(self._source, self._traced, program.signature)
            return self._settle(program, run)
        self._before = program.clone()
        return tuple(self._moved(program, run))

    def _evaluated(self, program: Program) -> Run:
        return evaluated(program, exact=self.exact)

    @property
    def exact(self) -> bool:
        """Whether what is rounded is computed in float32: once a pass has declared it."""
        return bool(self._rounding)

    def _partly(self, program: Program) -> Run | None:
        backend = self._backend
        whole = len(program.components) == 1
        part = backend.partially_lowered(program.clone()) if backend is not None and whole else None
        if backend is None or part is None:
            return None
        with tempfile.TemporaryDirectory() as place:
            lowered = backend.write(part, Path(place), Demand())
            return backend.open(Path(place) / lowered.entry, exact=True)

    def _settle(self, program: Program, run: Run) -> tuple[Finding, ...]:
        """Compare with the source alone, and remember what is computed from now on."""
        findings = self._against_source(program, run)
        self._before = program.clone()
        self._trials = self._given if self._given is not None else trials(program)
        whole = [trial for trial in self._trials if not trial.past]
        batches = [without_caches(program, trial.feeds) for trial in whole]
        results = self._reference.run(batches, self._transform())
        self._wanted = dict(zip(whole, results, strict=True))
        self._outputs = {trial: run(trial.feeds) for trial in self._trials}
        given = [] if self._given is None else self._compared(program, self._wanted)
        return (*findings, *given)

    def _compared(self, program: Program, wanted: dict[Trial, Arrays]) -> Iterator[Finding]:
        for trial, right in wanted.items():
            yield from self._findings(program, trial, self._outputs[trial], right)

    def _against_source(self, program: Program, run: Run) -> tuple[Finding, ...]:
        """Compare on the matrix, through the cache too; not on inputs that were given."""
        if self._given is not None:
            return ()
        tolerance = self.tolerance
        found = measure(program, run, self._reference, self._transform())
        return tuple(Finding(SOURCE, each, tolerance) for each in found)

    @property
    def tolerance(self) -> float:
        """What is allowed against the source."""
        return max([TOLERANCE, *(each.left for each in self._rounding)])

    def _transform(self) -> Callable[[str, Any], Any] | None:
        return rounding_of(self._rounding, self._unrounded) if self._unrounded else None

    def _moved(self, program: Program, run: Run) -> Iterator[Finding]:
        for trial in self._trials:
            found = run(trial.feeds)
            yield from self._findings(program, trial, found, self._outputs[trial], STEP)
            if trial in self._wanted:
                yield from self._findings(program, trial, found, self._wanted[trial])
            self._outputs[trial] = found

    def _findings(
        self,
        program: Program,
        trial: Trial,
        found: Arrays,
        wanted: Arrays,
        step: float | None = None,
    ) -> Iterator[Finding]:
        if not (told := told_of(program.signature, wanted, trial.tokens)):
            return
        compared = compare(trial.label, found, told, trial.tokens, [*caches(program)])
        if step is None:
            yield Finding(SOURCE, compared, self.tolerance, trial)
        else:
            yield Finding(BEFORE, compared, step, trial)
