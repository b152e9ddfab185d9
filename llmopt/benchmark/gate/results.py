"""The result of a check, and its JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from llmopt.benchmark.gate.decisions import Evidence
from llmopt.benchmark.gate.proxies import ProxyChange
from llmopt.benchmark.gate.rounds import Measured
from llmopt.benchmark.machine import MachineFingerprint
from llmopt.errors import LlmoptError

SCHEMA: Final = 1
EXIT_CODES: Final = {"pass": 0, "fail": 1, "refused": 3, "inconclusive": 4}


@dataclass(frozen=True)
class Recorded:
    """The measurements of one candidate.

    Args:
        name: Name of the candidate.
        path: Path of the candidate.
        target: Target that it is compiled for.
        workload: Workload as text.
        threads: Threads inside one operator.
        rounds_s: Duration of each round.
        measured: Measurements of every process of both sides.
    """

    name: str
    path: str
    target: str
    workload: str
    threads: int
    rounds_s: tuple[float, ...]
    measured: tuple[Measured, ...]


@dataclass(frozen=True)
class CheckResult:
    """The result of a check.

    Args:
        baseline: Baseline as the user spelled it.
        machine: Machine that it ran on.
        recorded: Measurements of each candidate.
        answers: Evidence and verdicts of gated metrics.
        informed: Evidence for metrics that are not gated.
        changes: Changes of counts.
        proxies: Whether counts are gated, only reported, or gated alone.
        refusal: Reason why times are not comparable; empty if they are.
        later: Whether the baseline was measured earlier, which makes the test weaker.
    """

    baseline: str
    machine: MachineFingerprint
    recorded: tuple[Recorded, ...]
    answers: tuple[Evidence, ...]
    informed: tuple[Evidence, ...]
    changes: tuple[ProxyChange, ...]
    proxies: str = "gate"
    refusal: str = ""
    later: bool = False

    @property
    def verdict(self) -> str:
        """``"pass"``, ``"fail"``, ``"inconclusive"``, or ``"refused"``: not comparable."""
        verdicts = {answer.verdict for answer in self.answers}
        if "fail" in verdicts or any(map(self.fails, self.changes)):
            return "fail"
        if "refused" in verdicts:
            return "refused"
        return "inconclusive" if "open" in verdicts else "pass"

    @property
    def exit_code(self) -> int:
        """The exit code of the command."""
        return EXIT_CODES[self.verdict]

    def fails(self, change: ProxyChange) -> bool:
        """Whether a count fails the check; a limit from a budget always can."""
        return change.failed and (change.limited or self.proxies != "report")

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "baseline": self.baseline,
            "baseline_measured_at_another_time": self.later,
            "refusal": self.refusal or None,
            "machine": asdict(self.machine) | {"fingerprint": self.machine.fingerprint},
            "metrics": [_answer(answer, gated=True) for answer in self.answers]
            + [_answer(answer, gated=False) for answer in self.informed],
            "proxies": [
                asdict(change) | {"verdict": self._worded(change)} for change in self.changes
            ],
            "artifacts": [_recorded(each) for each in self.recorded],
        }

    def to_json(self) -> str:
        """Return the JSON text of the result."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def _worded(self, change: ProxyChange) -> str:
        if self.fails(change):
            return "fail"
        return "reported" if self.proxies == "report" and not change.limited else "pass"


def failure(error: LlmoptError) -> dict[str, Any]:
    """Return the JSON of a check that ended in an error."""
    code = error.exit_code
    return {"schema": SCHEMA, "verdict": "error", "exit_code": code, "error": str(error)}


def verdict_of(answer: Evidence) -> str:
    """Return the verdict on one question, worded as that of a check."""
    return "inconclusive" if answer.verdict == "open" else answer.verdict


def _answer(answer: Evidence, *, gated: bool) -> dict[str, Any]:
    question, control = answer.question, answer.control
    return {
        "artifact": question.artifact,
        "metric": question.metric,
        "verdict": verdict_of(answer) if gated else "reported",
        "allowed": question.allowance if question.most is None else None,
        "max": question.most,
        "baseline": _number(answer.baseline) if question.most is None else None,
        "candidate": _number(answer.candidate),
        "change": _number(answer.change) if answer.processes else None,
        "interval_95": _numbers(answer.interval),
        "processes": answer.processes,
        "control": None
        if control is None
        else {
            "change": _number(math.expm1(control.value)),
            "standard_error": _number(control.error),
            "smallest_detectable_change": _number(answer.detectable),
        },
    }


def _recorded(each: Recorded) -> dict[str, Any]:
    facts = {key: value for key, value in vars(each).items() if key != "measured"}
    return facts | {"processes": [measured.to_dict() for measured in each.measured]}


def _numbers(values: Sequence[float] | None) -> list[float | None] | None:
    return None if values is None else [_number(value) for value in values]


def _number(value: float | None) -> float | None:
    """Return a finite number, else None, which JSON can hold."""
    return value if value is not None and math.isfinite(value) else None
