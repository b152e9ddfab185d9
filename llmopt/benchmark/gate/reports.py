"""Reports of a check: table rows, Markdown and JUnit XML."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from llmopt.benchmark.gate.amounts import percent, spell
from llmopt.benchmark.gate.decisions import PROCESSES, Evidence
from llmopt.benchmark.gate.proxies import ProxyChange
from llmopt.benchmark.gate.results import CheckResult, verdict_of

MARKER: Final = "<!-- llmopt check -->"
"""The first line of a comment, by which CI finds the one to replace."""
NAMES: Final = {
    "ttft_s": "first token",
    "time_per_output_token_s": "each further token",
    "encode_latency_s": "batch encoding",
    "run_latency_s": "one run",
    "load_s": "loading",
    "peak_rss_bytes": "peak memory",
    "size_bytes": "size of the artifact",
    "weight_bytes_per_token": "weights read per token",
    "flops_per_token": "operations per token",
    "attention_flops_per_pair": "attention operations per token pair",
    "cache_bytes_per_token": "cache per token",
    "activation_bytes": "planned activation memory",
}
HEADER: Final = ("metric", "baseline", "candidate", "change", "95 % interval", "allowed", "verdict")
_MARKS: Final = {"pass": "✅", "fail": "❌", "inconclusive": "❔", "refused": "⛔", "reported": "·"}
_WORDS: Final = {
    "pass": "no regression",
    "fail": "regression",
    "inconclusive": "inconclusive: the machine was too noisy for the time budget",
    "refused": "times are not comparable",
}
_MAX_ALIKE: Final = 3
"""Rows of like counts in a table; the JSON has all."""


@dataclass(frozen=True)
class MetricRow:
    """A row of the table.

    Args:
        artifact: Name of the candidate.
        cells: Cells under `HEADER`.
        verdict: Verdict, the last cell.
        detail: Explanation in words.
    """

    artifact: str
    cells: tuple[str, ...]
    verdict: str
    detail: str = ""


def rows(result: CheckResult) -> list[MetricRow]:
    """Return the table: gated metrics, others, then counts that differ or are limited."""
    lines = [_measured(answer, verdict_of(answer)) for answer in result.answers]
    lines += [_measured(answer, "reported") for answer in result.informed]
    return lines + [_counted(change, result) for change in notable(result)]


def notable(result: CheckResult) -> list[ProxyChange]:
    """Return the counts worth reporting: limits, and those that changed."""
    return [c for c in result.changes if c.limited or result.fails(c) or c.baseline != c.candidate]


def shortened(result: CheckResult) -> list[MetricRow]:
    """Return the table with only the first few of many layers that changed alike."""
    every = rows(result)
    counts = Counter(map(_likeness, every))
    kept: list[MetricRow] = []
    seen: Counter[tuple[str, ...]] = Counter()
    for row in every:
        like = _likeness(row)
        seen[like] += 1
        if seen[like] <= _MAX_ALIKE:
            kept.append(row)
        elif seen[like] == _MAX_ALIKE + 1:
            cells = (f"… and {counts[like] - _MAX_ALIKE} more like it", *[""] * (len(HEADER) - 2))
            kept.append(MetricRow(row.artifact, (*cells, row.verdict), row.verdict))
    return kept


def _likeness(row: MetricRow) -> tuple[str, ...]:
    return (row.artifact, re.sub(r"\d+", "0", row.cells[0]), *row.cells[3:])


def summary(result: CheckResult) -> str:
    """Return the verdict in one line."""
    unchanged = len(result.changes) - len(notable(result))
    counted = f"; {unchanged} counts are unchanged" if unchanged else ""
    few = [a for a in result.answers if a.verdict == "open" and a.processes < PROCESSES]
    if result.verdict == "inconclusive" and few:
        return (
            f"inconclusive: the time budget allowed {few[0].processes} processes per side and "
            f"{PROCESSES} are needed; raise --max-time{counted}"
        )
    return f"{_WORDS[result.verdict]}{counted}"


def notes(result: CheckResult) -> list[str]:
    """Return the notes that qualify the table."""
    lines = []
    if result.refusal:
        lines.append(
            f"Times are not compared: the baseline is from another machine ({result.refusal}). "
            "Compare with an artifact instead of a file, or recreate the file here with --update."
        )
    elif result.later and result.answers:
        lines.append(
            "The baseline was measured earlier: anything that changed on the machine since then "
            "looks like a change of the artifact. Compare with an artifact for a stronger test."
        )
    lines += [_control(answer) for answer in result.answers if answer.detectable is not None]
    lines += [
        f"{each.name}: {each.workload}, {each.threads} threads, {len(each.rounds_s)} rounds of "
        f"fresh processes in {sum(each.rounds_s):.0f} s"
        for each in result.recorded
        if each.rounds_s
    ]
    return lines


def markdown(result: CheckResult) -> str:
    """Return a comment for a pull request; its first line is `MARKER`."""
    head = f"### {_MARKS[result.verdict]} llmopt check: {summary(result)}"
    lines = shortened(result)
    table = _table([_marked(row) for row in lines])
    details = [f"- `{r.artifact}` {r.cells[0]}: {_escaped(r.detail)}" for r in lines if r.detail]
    parts = [MARKER, head, table, "\n".join(details)]
    parts += ["\n".join(f"<sub>{_escaped(note)}</sub>  " for note in notes(result))]
    return "\n\n".join(filter(None, parts)) + "\n"


def junit(result: CheckResult) -> str:
    """Return JUnit XML: a suite per artifact, a case per metric and count."""
    root = ET.Element("testsuites", name="llmopt check")
    for each in result.recorded:
        cases = [_case(r) for r in rows(result) if r.artifact == each.name]
        suite = ET.SubElement(root, "testsuite", name=_printable(each.name), tests=str(len(cases)))
        for kind in ("failure", "skipped"):
            count = sum(case.find(kind) is not None for case in cases)
            suite.set("failures" if kind == "failure" else kind, str(count))
        suite.set("errors", "0")
        suite.set("time", f"{sum(each.rounds_s):.1f}")
        suite.extend(cases)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def junit_error(message: str) -> str:
    """Return the JUnit XML of a check that failed to run."""
    root = ET.Element("testsuites", name="llmopt check")
    suite = ET.SubElement(root, "testsuite", name="llmopt check", tests="1", errors="1")
    case = ET.SubElement(suite, "testcase", name="check", classname="llmopt")
    ET.SubElement(case, "error", message=_printable(message))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    """Return text without characters that XML does not allow."""
    return "".join(c if c.isprintable() else " " for c in text)


def _measured(answer: Evidence, verdict: str) -> MetricRow:
    question, metric = answer.question, answer.question.metric
    interval = answer.interval
    cells = (
        NAMES.get(metric, metric) + (" (limit)" if question.most is not None else ""),
        spell(metric, answer.baseline) if answer.processes else "-",
        spell(metric, answer.candidate) if answer.processes else "-",
        percent(answer.change, signed=True) if answer.processes else "-",
        "-" if interval is None else " … ".join(percent(x, signed=True) for x in interval),
        "-" if verdict == "reported" else _allowed(question.allowance, question.most, metric),
        verdict,
    )
    return MetricRow(question.artifact, cells, verdict)


def _counted(change: ProxyChange, result: CheckResult) -> MetricRow:
    name, _, module = change.metric.partition(" ")
    title = NAMES.get(name, name) + (f" of {module}" if module else "")
    verdict = (
        "fail" if result.fails(change) else "reported" if result.proxies == "report" else "pass"
    )
    share = None
    if change.baseline and change.candidate is not None:
        share = change.candidate / change.baseline - 1
    limit = ("at least " if change.falls else "at most ") + spell(name, change.baseline)
    cells = (
        title + (" (limit)" if change.limited else ""),
        spell(name, None if change.limited else change.baseline),
        spell(name, change.candidate),
        "-" if share is None or change.limited else percent(share, signed=True),
        "exact",
        limit if change.limited else percent(change.allowance),
        verdict,
    )
    return MetricRow(change.artifact, cells, verdict, change.detail)


def _allowed(allowance: float, most: float | None, metric: str) -> str:
    return percent(allowance) if most is None else f"at most {spell(metric, most)}"


def _control(answer: Evidence) -> str:
    assert answer.control is not None
    assert answer.detectable is not None
    name = NAMES.get(answer.question.metric, answer.question.metric)
    low, high = (100 * (x) for x in answer.control.interval())
    return (
        f"Control, {name} of {answer.question.artifact}: processes of the same artifact differ "
        f"by {low:+.1f} … {high:+.1f} %; a change of {percent(answer.detectable)} would have been "
        "detected 19 times in 20"
    )


def _marked(row: MetricRow) -> list[str]:
    verdict = f"{_MARKS[row.verdict]} {row.cells[-1]}".rstrip()
    return [f"`{row.artifact}`", *row.cells[:-1], verdict]


def _table(lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return ""
    header = ["artifact", *HEADER]
    every = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in every)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _case(row: MetricRow) -> ET.Element:
    case = ET.Element("testcase", name=row.cells[0], classname=_printable(row.artifact))
    numbers = ", ".join(f"{k} {v}" for k, v in zip(HEADER[1:-1], row.cells[1:-1], strict=True) if v)
    text = _printable(f"{numbers}; {row.detail}" if row.detail else numbers)
    if row.verdict == "fail":
        ET.SubElement(case, "failure", message=numbers).text = text
    elif row.verdict in {"inconclusive", "refused"}:
        ET.SubElement(case, "skipped", message=f"{row.verdict}: {numbers}")
    return case
