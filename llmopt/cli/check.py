"""``llmopt check``: whether artifacts became slower, larger or worse than their baseline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from llmopt.cli.artifacts import is_bundle, one_each, require_there, trust, trust_options
from llmopt.cli.progress import Progress
from llmopt.cli.text import echo_json, table
from llmopt.errors import LlmoptError, UsageError

if TYPE_CHECKING:
    from llmopt.benchmark.gate import CheckRequest, CheckResult

CONFIG: Final = Path("llmopt.toml")
_SUMMARY: Final = "GITHUB_STEP_SUMMARY"


@click.command("check")
@click.argument(
    "artifacts",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
    metavar="ARTIFACT...",
)
@click.option(
    "--baseline",
    required=True,
    type=click.Path(path_type=Path),
    metavar="ARTIFACT|FOLDER|FILE.json",
    help="An artifact, a folder of artifacts of the same names, or a file that --update wrote.",
)
@click.option(
    "--max-regression",
    multiple=True,
    metavar="[METRIC=]5%",
    help="How much larger latencies, or one metric, may be. Repeatable.  [default: 5%; "
    "peak_rss_bytes 10%, load_s 20%, counts 0%]",
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help="Gate this metric: ttft_s, time_per_output_token_s, encode_latency_s, "
    "run_latency_s, load_s, peak_rss_bytes. Repeatable.  [default: all but load_s]",
)
@click.option(
    "--workload",
    metavar="TEXT",
    help="prefill=8,decode=64, encode=1x128 (rows x tokens), or FILE.npz, one array for each "
    "input.  [default: by task]",
)
@click.option(
    "--threads", type=int, metavar="N", help="Threads.  [default: every usable core but one]"
)
@click.option(
    "--max-time",
    default="120s",
    show_default=True,
    metavar="SECONDS",
    help="How long each artifact may be measured; what is not known then is inconclusive.",
)
@click.option(
    "--proxies",
    type=click.Choice(["gate", "report", "only"]),
    default="gate",
    show_default=True,
    help="Gate counts (operators, bytes, operations) exactly, only report them, or gate nothing "
    "else, which times nothing.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="Budgets.  [default: llmopt.toml, if there is one]",
)
@click.option("--update", is_flag=True, help="Write the baseline's file from the artifacts.")
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write JUnit's XML.")
@click.option(
    "--markdown",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a comment for a pull request.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, every sample in it.")
@trust_options
@click.pass_context
def check_command(ctx: click.Context, /, artifacts: tuple[Path, ...], **options: Any) -> None:
    """Fail if artifacts are slower or larger than before.

    Baseline and candidate are measured in turns, in fresh processes, until it is known whether
    they differ by more than is allowed. Exit codes: 0 no regression, 1 a regression, 3 the
    baseline is of another machine, 4 inconclusive.
    """
    require_there(*artifacts)
    request = _request(artifacts, options)
    _check_places(options)
    if options["update"]:
        _update(request, options)
        return
    require_there(request.baseline)
    try:
        result = _check(request)
    except LlmoptError as error:
        _write_error(error, options)
        raise
    _write(result, options)
    click.echo(result.to_json() if options["as_json"] else _text(result), nl=not options["as_json"])
    ctx.exit(result.exit_code)


def _request(artifacts: tuple[Path, ...], options: dict[str, Any]) -> CheckRequest:
    from llmopt.benchmark.gate import CheckRequest, read_budgets
    from llmopt.benchmark.gate.amounts import amount
    from llmopt.benchmark.gate.budgets import require_measured

    for metric in options["metrics"]:
        require_measured(metric, "--metric")
    most = amount(options["max_time"], "--max-time")
    if most <= 0:
        raise UsageError("--max-time has to be more than 0 s")
    if options["threads"] is not None and options["threads"] < 1:
        raise UsageError("--threads has to be 1 or more")
    config = options["config"] or (CONFIG if CONFIG.is_file() else None)
    return CheckRequest(
        candidates=artifacts,
        baseline=options["baseline"],
        allowances=_allowances(options["max_regression"]),
        metrics=options["metrics"],
        workload=options["workload"],
        threads=options["threads"],
        max_time_s=most,
        proxies=options["proxies"],
        budgets=() if config is None else read_budgets(config),
        trust=one_each(trust(options), [*artifacts, *filter(is_bundle, [options["baseline"]])]),
    )


def _check_places(options: dict[str, Any]) -> None:
    """Say now, and not after minutes of measuring, that something cannot be written."""
    from llmopt.artifact.writer import check_destination

    written = [options["junit"], options["markdown"]]
    for place in filter(None, [*written, options["baseline"] if options["update"] else None]):
        check_destination(place, force=True)


def _allowances(texts: Sequence[str]) -> dict[str, float]:
    from llmopt.benchmark.gate.amounts import amount
    from llmopt.benchmark.gate.budgets import require_comparable

    found = {}
    for text in texts:
        metric, sign, share = text.rpartition("=")
        if sign:
            require_comparable(metric, "--max-regression")
        found[metric] = amount(share, "--max-regression")
    return found


def _check(request: CheckRequest) -> CheckResult:
    with Progress() as progress:
        progress("starting")
        from llmopt.benchmark.gate import check

        return check(request, progress)


def _update(request: CheckRequest, options: dict[str, Any]) -> None:
    from llmopt.artifact.writer import staged_file

    if request.baseline.suffix != ".json":
        raise UsageError(f"--update writes a file: --baseline FILE.json, not {request.baseline}")
    if options["junit"] or options["markdown"]:
        raise UsageError("--update compares nothing: leave out --junit and --markdown")
    with Progress() as progress:
        progress("starting")
        from llmopt.benchmark.gate import update

        baseline = update(request, progress)
    with staged_file(request.baseline, force=True) as staging:
        staging.write_text(baseline.to_json(), encoding="utf-8")
    if options["as_json"]:
        click.echo(baseline.to_json(), nl=False)
        return
    click.echo(f"{request.baseline}: written, with {', '.join(baseline.artifacts)}")


def _write(result: CheckResult, options: dict[str, Any]) -> None:
    from llmopt.benchmark.gate.reports import junit, markdown

    if options["junit"]:
        _write_text(options["junit"], junit(result))
    if options["markdown"]:
        _write_text(options["markdown"], markdown(result))
    if summary := os.environ.get(_SUMMARY):
        try:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(markdown(result))
        except OSError as error:
            click.echo(f"Warning: {_SUMMARY}: {error.strerror}", err=True)


def _write_error(error: LlmoptError, options: dict[str, Any]) -> None:
    from llmopt.benchmark.gate.reports import junit_error
    from llmopt.benchmark.gate.results import failure

    if options["as_json"]:
        echo_json(failure(error))
    if options["junit"]:
        _write_text(options["junit"], junit_error(str(error)))


def _write_text(place: Path, text: str) -> None:
    from llmopt.artifact.writer import staged_file

    with staged_file(place, force=True) as staging:  # CI writes the same file in every run
        staging.write_text(text, encoding="utf-8")


def _text(result: CheckResult) -> str:
    from llmopt.benchmark.gate.reports import HEADER, notes, shortened, summary

    lines = shortened(result)
    several = len(result.recorded) > 1
    header = ["artifact", *HEADER] if several else list(HEADER)
    cells = [[*([row.artifact] if several else []), *row.cells] for row in lines]
    details = [f"{row.cells[0]}: {row.detail}" for row in lines if row.detail]
    parts = [table(header, cells) if cells else "", "\n".join(details), "\n".join(notes(result))]
    return "\n\n".join([*filter(None, parts), summary(result)])
