"""What was compared after a pass, how far off it was, and the error where that is too far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from llmopt.errors import AccuracyError, PassError
from llmopt.verification import Compared
from llmopt.verification.trials import Trial

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
        tolerance: The largest error that is allowed.
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
    """Every comparison after one pass.

    Args:
        name: The pass; ``TRACE`` is what every pass starts from.
        findings: Every comparison.
        duration_s: Seconds that they took.
        problem: The reason why the Program cannot be run, if it cannot.
        note: The reason why nothing was compared, if nothing was.
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
        same = [each for each in self.findings if each.against == against]
        return max(same, key=lambda each: each.compared.error_rel, default=None)

    def summary(self) -> dict[str, Any]:
        """Return what ``--json`` shows: the worst error against each, or why there is none.

        An error that is no number, of a wrong shape or of NaN, is None.
        """
        data: dict[str, Any] = {"check_s": round(self.duration_s, 3)}
        for key, against in (("before", BEFORE), ("source", SOURCE)):
            if (worst := self.worst(against)) is not None:
                case = f"{worst.compared.label} {worst.compared.output}"
                data[key] = {"error_rel": plain(worst.compared.error_rel), "case": case}
        return data | ({"note": self.note or self.problem} if self.note or self.problem else {})

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
        compared = worst.compared
        what, hint = (
            (f"pass {self.name!r} changed what the Program computes", _without(self.name))
            if self.name != TRACE
            else ("before any pass, the traced Program is not what its source computes", _REPORT)
        )
        where = f"at {compared.label}: error of {compared.output!r} against {worst.against}"
        raise AccuracyError(f"{what}, {where}", compared.error_rel, worst.tolerance, hint)


def _without(name: str) -> str:
    return (
        "`llmopt bisect` finds the rewrite and writes an example; "
        f"--passes 'default,-{name}' compiles without it"
    )
