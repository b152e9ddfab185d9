"""What a check found, for people and for CI: rows of tables, Markdown, JUnit's XML."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from llmopt.benchmark.gate.amounts import percent, shown
from llmopt.benchmark.gate.decisions import PROCESSES, Evidence
from llmopt.benchmark.gate.proxies import ProxyChange
from llmopt.benchmark.gate.results import CheckResult, verdict_of

MARKER: Final = "<!-- llmopt check -->"
"""The first line of the comment, by which it is found when it is to be replaced."""
NAMES: Final = {
    "ttft_s": "first token",
    "time_per_output_token_s": "each token after it",
    "encode_latency_s": "encoding a batch",
    "run_latency_s": "one run",
    "load_s": "loading",
    "peak_rss_bytes": "peak memory",
    "size_bytes": "size of the artifact",
    "weight_bytes_per_token": "weights read for a token",
    "flops_per_token": "operations for a token",
    "attention_flops_per_pair": "operations of attention for a pair of tokens",
    "cache_bytes_per_token": "cache of a token",
    "activation_bytes": "planned memory of activations",
}
HEADER: Final = ("metric", "baseline", "candidate", "change", "95 % interval", "allowed", "verdict")
_MARKS: Final = {"pass": "✅", "fail": "❌", "inconclusive": "❔", "refused": "⛔", "reported": "·"}
_WORDS: Final = {
    "pass": "no regression",
    "fail": "regression",
    "inconclusive": "inconclusive: the machine was too noisy for the time there was",
    "refused": "times could not be compared",
}
_MOST: Final = 3
"""Lines of counts that a table shows; the JSON has all."""


@dataclass(frozen=True)
class MetricRow:
    """A line of the table.

    Args:
        artifact: The candidate.
        cells: As in `HEADER`.
        verdict: The last of them.
        detail: More of it, in words.
    """

    artifact: str
    cells: tuple[str, ...]
    verdict: str
    detail: str = ""


def rows(result: CheckResult) -> list[MetricRow]:
    """Return the table: what is gated, what is not, then counts that differ or are limited."""
    lines = [_measured(answer, verdict_of(answer)) for answer in result.answers]
    lines += [_measured(answer, "reported") for answer in result.informed]
    return lines + [_counted(change, result) for change in told(result)]


def told(result: CheckResult) -> list[ProxyChange]:
    """Return the counts worth telling: limits, and those that are others than before."""
    return [c for c in result.changes if c.limited or result.fails(c) or c.baseline != c.candidate]


def shortened(result: CheckResult) -> list[MetricRow]:
    """Return the table, of many layers that changed alike the first few."""
    every = rows(result)
    many = Counter(map(_likeness, every))
    kept: list[MetricRow] = []
    seen: Counter[tuple[str, ...]] = Counter()
    for row in every:
        like = _likeness(row)
        seen[like] += 1
        if seen[like] <= _MOST:
            kept.append(row)
        elif seen[like] == _MOST + 1:
            cells = (f"… and {many[like] - _MOST} more like it", *[""] * (len(HEADER) - 2))
            kept.append(MetricRow(row.artifact, (*cells, row.verdict), row.verdict))
    return kept


def _likeness(row: MetricRow) -> tuple[str, ...]:
    return (row.artifact, re.sub(r"\d+", "0", row.cells[0]), *row.cells[3:])


def summary(result: CheckResult) -> str:
    """Return the verdict in one line."""
    same = len(result.changes) - len(told(result))
    counted = f"; {same} counts are the same" if same else ""
    few = [a for a in result.answers if a.verdict == "open" and a.processes < PROCESSES]
    if result.verdict == "inconclusive" and few:
        return (
            f"inconclusive: there was time for {few[0].processes} processes of each side, and "
            f"{PROCESSES} are needed; give more with --max-time{counted}"
        )
    return f"{_WORDS[result.verdict]}{counted}"


def notes(result: CheckResult) -> list[str]:
    """Return what a reader has to know to trust the table."""
    found = []
    if result.refusal:
        found.append(
            f"Times are not compared: the baseline is of another machine ({result.refusal}). "
            "Compare with an artifact instead of a file, or write the file anew here with --update."
        )
    elif result.later and result.answers:
        found.append(
            "The baseline was measured at another time: what changed on the machine since then "
            "looks like a change of the artifact. Compare with an artifact for the stronger test."
        )
    found += [_control(answer) for answer in result.answers if answer.detectable is not None]
    found += [
        f"{each.name}: {each.workload}, {each.threads} threads, {len(each.rounds_s)} rounds of "
        f"fresh processes in {sum(each.rounds_s):.0f} s"
        for each in result.recorded
        if each.rounds_s
    ]
    return found


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
    """Return JUnit's XML: a suite for each artifact, a case for each metric and count."""
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
    """Return JUnit's XML of a check that could not be made."""
    root = ET.Element("testsuites", name="llmopt check")
    suite = ET.SubElement(root, "testsuite", name="llmopt check", tests="1", errors="1")
    case = ET.SubElement(suite, "testcase", name="check", classname="llmopt")
    ET.SubElement(case, "error", message=_printable(message))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    """Return text without what XML cannot hold."""
    return "".join(c if c.isprintable() else " " for c in text)


def _measured(answer: Evidence, verdict: str) -> MetricRow:
    question, metric = answer.question, answer.question.metric
    known = answer.interval
    cells = (
        NAMES.get(metric, metric) + (" (limit)" if question.most is not None else ""),
        shown(metric, answer.baseline) if answer.processes else "-",
        shown(metric, answer.candidate) if answer.processes else "-",
        percent(answer.change, signed=True) if answer.processes else "-",
        "-" if known is None else " … ".join(percent(x, signed=True) for x in known),
        "-" if verdict == "reported" else _allowed(question.allowance, question.most, metric),
        verdict,
    )
    return MetricRow(question.artifact, cells, verdict)


def _counted(change: ProxyChange, result: CheckResult) -> MetricRow:
    name, _, where = change.metric.partition(" ")
    title = NAMES.get(name, name) + (f" of {where}" if where else "")
    verdict = (
        "fail" if result.fails(change) else "reported" if result.proxies == "report" else "pass"
    )
    share = None
    if change.baseline and change.candidate is not None:
        share = change.candidate / change.baseline - 1
    limit = ("at least " if change.falls else "at most ") + shown(name, change.baseline)
    cells = (
        title + (" (limit)" if change.limited else ""),
        shown(name, None if change.limited else change.baseline),
        shown(name, change.candidate),
        "-" if share is None or change.limited else percent(share, signed=True),
        "exact",
        limit if change.limited else percent(change.allowance),
        verdict,
    )
    return MetricRow(change.artifact, cells, verdict, change.detail)


def _allowed(allowance: float, most: float | None, metric: str) -> str:
    return percent(allowance) if most is None else f"at most {shown(metric, most)}"


def _control(answer: Evidence) -> str:
    assert answer.control is not None
    assert answer.detectable is not None
    name = NAMES.get(answer.question.metric, answer.question.metric)
    low, high = (100 * (x) for x in answer.control.interval())
    return (
        f"Control, {name} of {answer.question.artifact}: processes of the same artifact differ "
        f"by {low:+.1f} … {high:+.1f} %; a change of {percent(answer.detectable)} would have been "
        "found 19 times in 20"
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
    said = ", ".join(f"{k} {v}" for k, v in zip(HEADER[1:-1], row.cells[1:-1], strict=True) if v)
    text = _printable(f"{said}; {row.detail}" if row.detail else said)
    if row.verdict == "fail":
        ET.SubElement(case, "failure", message=said).text = text
    elif row.verdict in {"inconclusive", "refused"}:
        ET.SubElement(case, "skipped", message=f"{row.verdict}: {said}")
    return case
