"""``llmopt bisect``: the pass and the rewrite that change what a model computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from llmopt.cli.plugins import plugin_option
from llmopt.cli.progress import Progress
from llmopt.cli.sources import source_options
from llmopt.cli.text import echo_json, fields

if TYPE_CHECKING:
    from llmopt.verification.bisection import Bisection, Culprit

SCHEMA: Final = 1
_AT_THE_EDGE: Final = "none: the graph's own inputs or outputs changed"
_UNATTRIBUTED: Final = "unknown: the pass changed several components, and none alone reproduces it"


@click.command("bisect")
@click.argument("source")
@click.option(
    "--passes",
    default="default",
    show_default=True,
    metavar="TEXT",
    help="Pass pipeline, such as default,my-pass.",
)
@plugin_option
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Arrays to compare on, one per input.  [default: a grid of sizes and paddings]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory for the reproducer.  [default: <source>.bisect]",
)
@source_options
@click.option("--force", is_flag=True, help="Overwrite an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.pass_context
def bisect_command(ctx: click.Context, /, source: str, as_json: bool, **options: Any) -> None:  # noqa: FBT001 - click
    """Find the rewrite of a pass that changes what SOURCE computes.

    The Program is run on the same inputs before and after each pass. The first pass that changes
    an output beyond tolerance is replayed one rewrite at a time; the offending rewrite is shown,
    and a minimal reproducer is written with the command that runs it.

    Exit codes: 0 every comparison is within tolerance, 1 one is not.
    """
    bisection, report = _bisected(source, options)
    if as_json:
        echo_json({"schema": SCHEMA, **report})
    else:
        click.echo(_text(bisection, report))
    ctx.exit(0 if bisection.culprit is None and report["status"] == "same" else 1)


def _bisected(source: str, options: dict[str, Any]) -> tuple[Bisection, dict[str, Any]]:
    from llmopt.artifact.writer import check_destination

    with Progress() as progress:
        progress("starting")
        from llmopt.compiler import CompileOptions, pipeline_of
        from llmopt.frontend.base import SourceOptions
        from llmopt.frontend.source import open_source
        from llmopt.runtime.npz import read_npz
        from llmopt.verification.bisection import bisect
        from llmopt.verification.reproducer import write_reproducer

        plugins = options["plugins"]
        pipeline = pipeline_of(CompileOptions(passes=options["passes"], plugins=plugins))
        arrays = None if options["inputs"] is None else read_npz(options["inputs"])
        names = [field.name for field in dataclasses.fields(SourceOptions)]
        reading = SourceOptions(**{n: options[n] for n in names if n in options})
        if options["output"] is not None:
            check_destination(options["output"], force=options["force"])
        progress("tracing")
        opened = open_source(source, reading)
        output = options["output"] or Path(f"{opened.name}.bisect")
        check_destination(output, force=options["force"])
        bisection = bisect(opened, pipeline, arrays, progress)
        report, culprit = _report(bisection), bisection.culprit
        if culprit is not None and culprit.component is not None:
            progress("reducing to a minimal reproducer")
            command = write_reproducer(culprit, output, plugins, force=options["force"])
            report["culprit"] |= {"example": str(output), "command": command}
    return bisection, report


def _report(bisection: Bisection) -> dict[str, Any]:
    """Return the ``--json`` report."""
    applied = ["", *(ran.applied for ran in bisection.ran)]
    passes = [
        {"name": check.name, "applied": count, **check.summary()}
        for check, count in zip(bisection.checks, applied, strict=False)
    ]
    culprit = {} if bisection.culprit is None else {"culprit": _culprit(bisection.culprit)}
    return {"status": bisection.status, "traced": passes[0], "passes": passes[1:], **culprit}


def _culprit(culprit: Culprit) -> dict[str, Any]:
    from llmopt.verification.each import plain

    rewrite, finding = culprit.rewrite, culprit.finding
    compared = None if finding is None else finding.compared
    return {
        "pass": culprit.item.name,
        "component": culprit.component,
        "problem": culprit.problem,
        "change": rewrite.number,
        "changes": rewrite.of,
        "node": rewrite.node,
        "case": "" if compared is None else compared.label,
        "output": "" if compared is None else compared.output,
        "error_rel": None if compared is None else plain(compared.error_rel),
        "tolerance": None if finding is None else finding.tolerance,
        "against": "" if finding is None else finding.against,
        "first_value": None if rewrite.first is None else rewrite.first.output,
        "first_error_rel": None if rewrite.first is None else plain(rewrite.first.error_rel),
        "before": rewrite.difference.before,
        "after": rewrite.difference.after,
    }


def _text(bisection: Bisection, report: dict[str, Any]) -> str:
    from llmopt.cli.summary import checks_table

    return "\n\n".join([checks_table(bisection.checks, bisection.ran), _verdict(bisection, report)])


def _verdict(bisection: Bisection, report: dict[str, Any]) -> str:
    if bisection.culprit is not None:
        return _described(report["culprit"])
    count = sum(len(check.findings) for check in bisection.checks)
    if report["status"] == "same":
        return f"No difference: all {count} comparisons are within tolerance."
    worst = max(bisection.checks[0].wrong, key=lambda each: each.compared.error_rel).compared
    return (
        f"The Program differs from its source before any pass runs: error of {worst.output!r} "
        f"{worst.error_rel:.3g} at {worst.label}. No pass is to blame; report this together with "
        "the source."
    )


def _described(culprit: dict[str, Any]) -> str:
    """Return the pass, the node, the text around it and the reproducer, formatted to be read."""
    number, of = culprit["change"], culprit["changes"]
    pairs = [("pass", culprit["pass"])]
    if culprit["component"]:
        pairs.append(("component", culprit["component"]))
    if number:
        pairs.append(("change", f"{number} of {of}"))
    unnamed = _UNATTRIBUTED if culprit["component"] is None else _AT_THE_EDGE
    pairs.append(("node", culprit["node"] or unnamed))
    if culprit["problem"]:
        pairs.append(("problem", culprit["problem"]))
    if culprit["tolerance"] is not None:
        error = f"{_number(culprit['error_rel'])}, allowed {culprit['tolerance']:.2g}"
        pairs.append(("inputs", culprit["case"]))
        pairs.append(("error", f"{error}, of {culprit['output']!r} against {culprit['against']}"))
    if culprit["first_value"] is not None:
        first = f"{culprit['first_value']} ({_number(culprit['first_error_rel'])})"
        pairs.append(("first difference", first))
    if culprit["component"] is None:
        return fields(pairs)
    pairs += [("reproducer", culprit["example"]), ("reproduce", culprit["command"])]
    text = [f"before\n{culprit['before']}", f"after\n{culprit['after']}"]
    return "\n\n".join([fields(pairs), *text])


def _number(error_rel: float | None) -> str:
    return "not finite" if error_rel is None else f"{error_rel:.2g}"
