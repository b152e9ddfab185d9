"""``llmopt check``: regressions of artifacts against a baseline in speed, size or quality."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from llmopt.cli.artifacts import (
    check_signer,
    is_bundle,
    require_exists,
    trust,
    trust_options,
)
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
    help="Artifact, folder of artifacts with the same names, or file written by --update.",
)
@click.option(
    "--max-regression",
    multiple=True,
    metavar="[METRIC=]5%",
    help="Largest allowed increase of latencies, or of one metric. Repeatable.  [default: 5%; "
    "peak_rss_bytes 10%, load_s 20%, counts 0%]",
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help="Metric to gate: ttft_s, time_per_output_token_s, encode_latency_s, "
    "run_latency_s, load_s, peak_rss_bytes. Repeatable.  [default: all but load_s]",
)
@click.option(
    "--workload",
    metavar="TEXT",
    help="Workload: prefill=8,decode=64, encode=1x128 (batch x tokens), or FILE.npz with one array "
    "per input.  [default: by task]",
)
@click.option(
    "--threads",
    type=int,
    metavar="N",
    help="Threads.  [default: all usable cores but one]",
)
@click.option(
    "--max-time",
    default="120s",
    show_default=True,
    metavar="SECONDS",
    help="Time budget per artifact; metrics still undecided after it are inconclusive.",
)
@click.option(
    "--proxies",
    type=click.Choice(["gate", "report", "only"]),
    default="gate",
    show_default=True,
    help="Gate static counts (operators, bytes, operations) exactly, only report them, or gate "
    "only them without timing anything.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="File of budgets.  [default: llmopt.toml, if it exists]",
)
@click.option("--update", is_flag=True, help="Write the artifacts to the baseline file.")
@click.option(
    "--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write a JUnit XML report."
)
@click.option(
    "--markdown",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a pull-request comment.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object with every sample.",
)
@trust_options
@click.pass_context
def check_command(ctx: click.Context, /, artifacts: tuple[Path, ...], **options: Any) -> None:
    """Fail if artifacts are slower or larger than their baseline.

    Runs of baseline and candidate are interleaved, in fresh processes, until it is certain
    whether they differ by more than allowed. Exit codes: 0 no regression, 1 regression, 3 the
    baseline is from another machine, 4 inconclusive.
    """
    require_exists(*artifacts)
    request = _request(artifacts, options)
    _check_destinations(options)
    if options["update"]:
        _update(request, options)
        return
    require_exists(request.baseline)
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
    max_time_s = amount(options["max_time"], "--max-time")
    if max_time_s <= 0:
        raise UsageError("--max-time must be above 0 s")
    if options["threads"] is not None and options["threads"] < 1:
        raise UsageError("--threads must be at least 1")
    config = options["config"] or (CONFIG if CONFIG.is_file() else None)
    return CheckRequest(
        candidates=artifacts,
        baseline=options["baseline"],
        allowances=_allowances(options["max_regression"]),
        metrics=options["metrics"],
        workload=options["workload"],
        threads=options["threads"],
        max_time_s=max_time_s,
        proxies=options["proxies"],
        budgets=() if config is None else read_budgets(config),
        trust=check_signer(trust(options), [*artifacts, *filter(is_bundle, [options["baseline"]])]),
    )


def _check_destinations(options: dict[str, Any]) -> None:
    """Fail now rather than after minutes of measuring if an output cannot be written."""
    from llmopt.artifact.writer import check_destination

    written = [options["junit"], options["markdown"]]
    for path in filter(None, [*written, options["baseline"] if options["update"] else None]):
        check_destination(path, force=True)


def _allowances(texts: Sequence[str]) -> dict[str, float]:
    from llmopt.benchmark.gate.amounts import amount
    from llmopt.benchmark.gate.budgets import require_comparable

    allowances = {}
    for text in texts:
        metric, sign, share = text.rpartition("=")
        if sign:
            require_comparable(metric, "--max-regression")
        allowances[metric] = amount(share, "--max-regression")
    return allowances


def _check(request: CheckRequest) -> CheckResult:
    with Progress() as progress:
        progress("starting")
        from llmopt.benchmark.gate import check

        return check(request, progress)


def _update(request: CheckRequest, options: dict[str, Any]) -> None:
    from llmopt.artifact.writer import staged_file

    if request.baseline.suffix != ".json":
        raise UsageError(f"--update writes a .json file; --baseline {request.baseline} is not one")
    if options["junit"] or options["markdown"]:
        raise UsageError("--update compares nothing; omit --junit and --markdown")
    with Progress() as progress:
        progress("starting")
        from llmopt.benchmark.gate import update

        baseline = update(request, progress)
    with staged_file(request.baseline, force=True) as staging:
        staging.write_text(baseline.to_json(), encoding="utf-8")
    if options["as_json"]:
        click.echo(baseline.to_json(), nl=False)
        return
    click.echo(f"wrote {request.baseline} with {', '.join(baseline.artifacts)}")


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


def _write_text(path: Path, text: str) -> None:
    from llmopt.artifact.writer import staged_file

    with staged_file(path, force=True) as staging:  # CI overwrites it in every run
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
