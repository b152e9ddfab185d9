"""What ``llmopt compile`` says of an artifact, and ``llmopt inspect`` of its manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from llmopt.cli.text import digits, fields, size, table

if TYPE_CHECKING:
    from llmopt.compiler import Artifact
    from llmopt.fusion import FusionCount
    from llmopt.passes.pipeline import Ran
    from llmopt.verification.checks import Checked

_SHOWN: Final = 5


def summary(artifact: Artifact) -> str:
    """Return where it is, how large, what was fused, and how far it is from its source."""
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
    """Return ", weights w8" for a quantized artifact, nothing for another."""
    return "".join(f", {name} {scheme}" for name, scheme in sorted(plan.items()))


def verification(found: Mapping[str, Any]) -> str:
    """Return the worst error and where it was."""
    if found.get("status") != "passed":
        return "no (--verify final compares the artifact with its source)"
    worst = found.get("worst_error_rel")
    error = "" if worst is None else f"; worst relative error {worst:.2g} at {found['worst_case']}"
    return f"{found.get('cases')} cases within {found.get('tolerance'):g} of the source{error}"


def quality(found: Mapping[str, Any]) -> str:
    """Return what quantization cost, with standard errors."""
    if "kl_mean" not in found:
        mean, least = found.get("cosine_mean"), found.get("cosine_min")
        return f"cosine to the source {mean} on average, {least} at least, on {found.get('text')}"
    parts = [f"KL {with_error(found['kl_mean'], found.get('kl_mean_error'))} nats"]
    if found.get("kl_p99") is not None:
        parts.append(f"99th percentile {digits(found['kl_p99'])}")
    error = found.get("top1_error")
    percent = with_error(found["top1"] * 100, None if error is None else error * 100)
    parts.append(f"top-1 agreement {percent} %")
    return f"{', '.join(parts)}, on {found.get('text')}"


def with_error(value: float, error: float | None) -> str:
    """Return a number and its standard error, to the same place.

    >>> with_error(97.43, 0.62), with_error(0.001732, 0.000121), with_error(1.0, None)
    ('97.4 ± 0.6', '0.0017 ± 0.0001', '1.00')
    """
    if not error:
        return digits(value)
    shown = digits(error, 1)
    places = len(shown.partition(".")[2])
    return f"{value:.{places}f} ± {shown}"


def _checks(artifact: Artifact) -> str:
    """Return how far the Program moved in each pass, where that was measured."""
    return checks_table(artifact.checks, artifact.passes) if artifact.checks else ""


def checks_table(checks: Sequence[Checked], passes: Sequence[Ran]) -> str:
    """Return a line for each pass: changes, seconds, worst errors; blank where nothing changed.

    Args:
        checks: Errors before any pass, and after each.
        passes: Results of the passes; fewer than checks, if one could not finish.
    """
    from llmopt.verification.checks import ELSEWHERE

    did = [("", ""), *((str(ran.applied), f"{ran.duration_s:.2f}") for ran in passes)]
    rows = []
    for check, told in zip(checks, did, strict=False):
        found = check.summary()
        absent = "-" if check.note == ELSEWHERE else ""
        errors = [_error(found[k]["error_rel"]) if k in found else absent for k in _AGAINST]
        rows.append([check.name, *told, *errors, f"{check.duration_s:.2f}"])
    notes = [f"-: {ELSEWHERE}"] if any(check.note == ELSEWHERE for check in checks) else []
    return "\n".join([table(_CHECKS, rows), *notes])


def _error(error_rel: float | None) -> str:
    return "?" if error_rel is None else f"{error_rel:.2g}"


_AGAINST: Final = ("before", "source")
_CHECKS: Final = (
    *("pass", "applied", "seconds"),
    *("error to before", "error to source", "seconds to check"),
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
            lines += [f"missed {kind}: {miss}" for miss in fused.misses[:_SHOWN]]
            if (more := len(fused.misses) - _SHOWN) > 0:
                lines.append(f"missed {kind}: {more} more; --json names them all")
    return "\n".join(lines)
