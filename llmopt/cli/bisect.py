"""``llmopt bisect``: which pass changes what a model computes, and where."""

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
_AT_THE_EDGE: Final = "none: what it reads or shows is another"
_UNTOLD: Final = "not told: the pass changed several components, and no one alone shows it"


@click.command("bisect")
@click.argument("source")
@click.option(
    "--passes",
    default="default",
    show_default=True,
    metavar="TEXT",
    help="The pipeline, as in default,my-pass.",
)
@plugin_option
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Compare on these arrays, one per input.  [default: a matrix of sizes and paddings]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where the example goes.  [default: <source>.bisect]",
)
@source_options
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.pass_context
def bisect_command(ctx: click.Context, /, source: str, as_json: bool, **options: Any) -> None:  # noqa: FBT001 - click
    """Find the pass that changes what SOURCE computes, and where.

    After each pass the Program is run on the same inputs as before it, and compared. The first
    pass that moves an output is run again, one change after the other; the change that does it is
    shown, and the smallest example of it is written, with the command that shows it again.

    Exits with 0 if nothing is wrong, with 1 if something is.
    """
    found, told = _bisected(source, options)
    if as_json:
        echo_json({"schema": SCHEMA, **told})
    else:
        click.echo(_text(found, told))
    ctx.exit(0 if found.culprit is None and told["status"] == "same" else 1)


def _bisected(source: str, options: dict[str, Any]) -> tuple[Bisection, dict[str, Any]]:
    from llmopt.artifact.writer import check_destination

    with Progress() as progress:
        progress("starting")
        from llmopt.compiler import CompileOptions, pipeline_of
        from llmopt.frontend.base import SourceOptions
        from llmopt.frontend.source import open_source
        from llmopt.passes.pipeline import items_of
        from llmopt.runtime.npz import read_npz
        from llmopt.verification.bisection import bisect
        from llmopt.verification.reproducer import write_reproducer

        plugins = options["plugins"]
        passes = items_of(options["passes"])
        pipeline = pipeline_of(CompileOptions(passes=passes, plugins=plugins))
        arrays = None if options["inputs"] is None else read_npz(options["inputs"])
        names = [field.name for field in dataclasses.fields(SourceOptions)]
        reading = SourceOptions(**{n: options[n] for n in names if n in options})
        if options["output"] is not None:
            check_destination(options["output"], force=options["force"])
        progress("tracing")
        opened = open_source(source, reading)
        place = options["output"] or Path(f"{opened.name}.bisect")
        check_destination(place, force=options["force"])
        found = bisect(opened, pipeline, arrays, progress)
        told = _told(found)
        if found.culprit is not None and found.culprit.component is not None:
            progress("looking for the smallest example")
            command = write_reproducer(found.culprit, place, plugins, force=options["force"])
            told["culprit"] |= {"example": str(place), "command": command}
    return found, told


def _told(found: Bisection) -> dict[str, Any]:
    """Return what ``--json`` shows."""
    did = ["", *(ran.applied for ran in found.ran)]
    passes = [
        {"name": check.name, "applied": count, **check.summary()}
        for check, count in zip(found.checks, did, strict=False)
    ]
    culprit = {} if found.culprit is None else {"culprit": _culprit(found.culprit)}
    return {"status": found.status, "traced": passes[0], "passes": passes[1:], **culprit}


def _culprit(culprit: Culprit) -> dict[str, Any]:
    from llmopt.verification.checks import plain

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
        "before": rewrite.text_before,
        "after": rewrite.text_after,
    }


def _text(found: Bisection, told: dict[str, Any]) -> str:
    from llmopt.cli.summary import checks_table

    return "\n\n".join([checks_table(found.checks, found.ran), _verdict(found, told)])


def _verdict(found: Bisection, told: dict[str, Any]) -> str:
    if found.culprit is not None:
        return _shown(told["culprit"])
    count = sum(len(check.findings) for check in found.checks)
    if told["status"] == "same":
        return f"Nothing is wrong: {count} comparisons, each within its tolerance."
    worst = max(found.checks[0].wrong, key=lambda each: each.compared.error_rel).compared
    return (
        f"The source itself computes something else than its Program, before any pass: error of "
        f"{worst.output!r} {worst.error_rel:.3g} at {worst.label}. No pass is to blame; report it "
        "with the source."
    )


def _shown(culprit: dict[str, Any]) -> str:
    """Return the pass, the node, the text around it and the example, for people to read."""
    number, of = culprit["change"], culprit["changes"]
    pairs = [("pass", culprit["pass"])]
    if culprit["component"]:
        pairs.append(("component", culprit["component"]))
    if number:
        pairs.append(("change", f"{number} of {of}"))
    unnamed = _UNTOLD if culprit["component"] is None else _AT_THE_EDGE
    pairs.append(("node", culprit["node"] or unnamed))
    if culprit["problem"]:
        pairs.append(("problem", culprit["problem"]))
    if culprit["tolerance"] is not None:
        error = f"{_number(culprit['error_rel'])}, allowed {culprit['tolerance']:.2g}"
        pairs.append(("inputs", culprit["case"]))
        pairs.append(("error", f"{error}, of {culprit['output']!r} against {culprit['against']}"))
    if culprit["first_value"] is not None:
        first = f"{culprit['first_value']} ({_number(culprit['first_error_rel'])})"
        pairs.append(("first value off", first))
    if culprit["component"] is None:
        return fields(pairs)
    pairs += [("example", culprit["example"]), ("again", culprit["command"])]
    text = [f"before\n{culprit['before']}", f"after\n{culprit['after']}"]
    return "\n\n".join([fields(pairs), *text])


def _number(error_rel: float | None) -> str:
    return "no number" if error_rel is None else f"{error_rel:.2g}"
