"""After each pass: the Program, the Program before the pass and the source on the same inputs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from llmopt.backends.base import Backend
from llmopt.errors import LlmoptError
from llmopt.frontend.reference import Reference
from llmopt.ir.program import Program
from llmopt.passes.base import Pass
from llmopt.passes.pipeline import Ran
from llmopt.verification.baseline import Subject, TrialBaseline, compared, traced
from llmopt.verification.checks import ELSEWHERE, TRACE, Checked
from llmopt.verification.trials import Trial


class Watch:
    """Compares what a Program computes after each pass with what it computed before.

    A pass that declares that it rounds weights (``RoundingPass``) or changes the signature is
    compared with the source alone, whose weights are rounded in the same way; activations are then
    computed in float32, here and after later passes. Operators that the evaluator does not know are
    run by the backend, where that runs what is lowered in part; else they are left to the proof of
    the artifact.

    Args:
        subject: The source, and what else stays the same.
        baseline: The state to compare with first.
        checks: The checks so far.

    Attributes:
        checks: The checks, pass by pass.
    """

    def __init__(
        self, subject: Subject, baseline: TrialBaseline, checks: Iterable[Checked]
    ) -> None:
        self.checks = [*checks]
        self._subject = subject
        self._baseline = baseline

    @classmethod
    def started(
        cls, reference: Reference, program: Program, inputs: Sequence[Trial] | None = None
    ) -> Watch:
        """Return the watch of a traced Program; its first check compares that with its source.

        Args:
            reference: The source.
            program: The Program, before any pass.
            inputs: Inputs to use instead of the matrix.
        """
        start = time.perf_counter()
        subject = Subject(reference, program.signature, inputs)
        findings, baseline = traced(subject, program)
        return cls(subject, baseline, [Checked(TRACE, findings, time.perf_counter() - start)])

    def forked(self, backend: Backend | None = None) -> Watch:
        """Return a watch that goes on from here, with the passes of one backend."""
        return Watch(replace(self._subject, backend=backend), self._baseline, self.checks)

    @property
    def exact(self) -> bool:
        """Whether what is rounded is computed in float32: once a pass has declared it."""
        return self._baseline.exact

    def __call__(self, item: Pass, program: Program, _: Ran) -> None:
        """Compare what the Program computes after ``item``; a hook of ``Pipeline.run``.

        Raises:
            PassError: It cannot be run.
            AccuracyError: It computes something else.
        """
        self.judge(item, program).require()

    def judge(self, item: Pass, program: Program) -> Checked:
        """Return how far the Program moved in ``item``, which has just run."""
        checked = self._checked(item, program)
        self.checks.append(checked)
        return checked

    def _checked(self, item: Pass, program: Program) -> Checked:
        start = time.perf_counter()
        state = self._baseline.after(item, program)
        if state.fingerprint == self._baseline.fingerprint:
            return Checked(item.name, note="it changed nothing")
        self._baseline = state
        try:
            findings, self._baseline = compared(self._subject, state, item, program)
        except LlmoptError as error:
            return Checked(item.name, problem=f"it cannot be run: {error}")
        note = "" if findings is not None else ELSEWHERE
        return Checked(item.name, findings or (), time.perf_counter() - start, note=note)
