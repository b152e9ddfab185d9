"""Summaries of an artifact for ``llmopt compile``, and of its manifest for ``inspect``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from llmopt.cli.text import digits, fields, size, table

if TYPE_CHECKING:
    from llmopt.compiler import Artifact
    from llmopt.fusion import FusionCount
    from llmopt.passes.pipeline import Ran
    from llmopt.verification.each import Checked

_LISTED_MISSES: Final = 5


def summary(artifact: Artifact) -> str:
    """Return the path, size, fusions and verification of an artifact as text."""
    manifest = artifact.manifest
    pairs = [
        ("artifact", str(artifact.path)),
        ("target", manifest.target),
        ("size", size(artifact.size_bytes) + precision(manifest.precision)),
        ("verified", verification(manifest.verification)),
    ]
    if manifest.quality:
        pairs.append(("quality", quality(manifest.quality)))
    parts = [fields(pairs), _fusion(artifact.fusion), _checks(artifact)]
    return "\n\n".join(filter(None, parts))


def precision(plan: Mapping[str, Any]) -> str:
    """Return ", weights w8" for a quantized artifact, else an empty text."""
    return "".join(f", {name} {scheme}" for name, scheme in sorted(plan.items()))


def verification(record: Mapping[str, Any]) -> str:
    """Return the tolerance, the worst error and its case as text."""
    if record.get("status") != "passed":
        return "no (--verify final compares the artifact with its source)"
    worst = record.get("worst_error_rel")
    error = "" if worst is None else f"; worst relative error {worst:.2g} at {record['worst_case']}"
    return f"{record.get('cases')} cases within {record.get('tolerance'):g} of the source{error}"


def quality(record: Mapping[str, Any]) -> str:
    """Return the quality loss of quantization as text, with standard errors."""
    if "kl_mean" not in record:
        mean, least = record.get("cosine_mean"), record.get("cosine_min")
        return f"cosine to the source: mean {mean}, lowest {least}, on {record.get('text')}"
    parts = [f"KL {with_error(record['kl_mean'], record.get('kl_mean_error'))} nats"]
    if record.get("kl_p99") is not None:
        parts.append(f"99th percentile {digits(record['kl_p99'])}")
    error = record.get("top1_error")
    percent = with_error(record["top1"] * 100, None if error is None else error * 100)
    parts.append(f"top-1 agreement {percent} %")
    return f"{', '.join(parts)}, on {record.get('text')}"


def with_error(value: float, error: float | None) -> str:
    """Return a number and its standard error, both to the same decimal.

    >>> with_error(97.43, 0.62), with_error(0.001732, 0.000121), with_error(1.0, None)
    ('97.4 ± 0.6', '0.0017 ± 0.0001', '1.00')
    """
    if not error:
        return digits(value)
    rounded = digits(error, 1)
    decimals = len(rounded.partition(".")[2])
    return f"{value:.{decimals}f} ± {rounded}"


def _checks(artifact: Artifact) -> str:
    """Return the error of the Program after each pass, if it was measured."""
    return checks_table(artifact.checks, artifact.passes) if artifact.checks else ""


def checks_table(checks: Sequence[Checked], passes: Sequence[Ran]) -> str:
    """Return a row for each pass: rewrites, seconds and worst errors, blank if none applied.

    Args:
        checks: Comparisons before any pass, and after each.
        passes: Reports of the passes; fewer than ``checks`` if one did not finish.
    """
    from llmopt.verification.each import ELSEWHERE

    reports = [("", ""), *((str(ran.applied), f"{ran.duration_s:.2f}") for ran in passes)]
    rows = []
    for check, report in zip(checks, reports, strict=False):
        compared = check.summary()
        absent = "-" if check.note == ELSEWHERE else ""
        errors = [_error(compared[k]["error_rel"]) if k in compared else absent for k in _AGAINST]
        rows.append([check.name, *report, *errors, f"{check.duration_s:.2f}"])
    notes = [f"-: {ELSEWHERE}"] if any(check.note == ELSEWHERE for check in checks) else []
    return "\n".join([table(_CHECKS, rows), *notes])


def _error(error_rel: float | None) -> str:
    return "?" if error_rel is None else f"{error_rel:.2g}"


_AGAINST: Final = ("before", "source")
_CHECKS: Final = (
    *("pass", "applied", "seconds"),
    *("error vs before", "error vs source", "seconds to check"),
)


def _fusion(report: Mapping[str, FusionCount]) -> str:
    if not report:
        return ""
    rows = [
        [kind, "?" if fused.expected is None else str(fused.expected), str(fused.fused)]
        for kind, fused in report.items()
    ]
    lines = [table(["fusion", "expected", "fused"], rows)]
    for kind, fused in report.items():
        if fused.expected is None or fused.fused < fused.expected:
            lines += [f"missed {kind}: {miss}" for miss in fused.misses[:_LISTED_MISSES]]
            if (more := len(fused.misses) - _LISTED_MISSES) > 0:
                lines.append(f"missed {kind}: {more} more; --json lists them all")
    return "\n".join(lines)
