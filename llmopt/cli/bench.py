"""``llmopt bench``: how fast artifacts are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from llmopt.cli.artifacts import require_there
from llmopt.cli.progress import Progress
from llmopt.cli.text import digits, size, table

if TYPE_CHECKING:
    from llmopt.benchmark import ArtifactResult, BenchmarkResult, Metric, Plan

_SHOWN: Final = {
    "prefill_tokens_per_s": ("prefill tok/s", 1.0),
    "decode_tokens_per_s": ("decode tok/s", 1.0),
    "encode_tokens_per_s": ("encode tok/s", 1.0),
    "ttft_s": ("first token ms", 1e3),
    "time_per_output_token_s": ("per token ms", 1e3),
    "encode_latency_s": ("per batch ms", 1e3),
    "load_s": ("load s", 1.0),
    "peak_rss_bytes": ("peak MB", 1e-6),
}
"""Heading and factor of each metric, in the order of the columns."""


@click.command("bench")
@click.argument(
    "artifacts",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
    metavar="ARTIFACT...",
)
@click.option(
    "--workload",
    metavar="TEXT",
    help="prefill=128,decode=64 or encode=8x128 (rows x tokens).  [default: by task]",
)
@click.option("--threads", type=int, metavar="N", help="Threads.  [default: every usable core]")
@click.option(
    "--repetitions", type=int, default=10, show_default=True, metavar="N", help="Of the workload."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Write the JSON object, raw samples included, to a file too.",
)
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
def bench_command(
    artifacts: tuple[Path, ...],
    as_json: bool,  # noqa: FBT001 - click
    **options: Any,
) -> None:
    """Measure how fast artifacts are, in turns.

    Each is also loaded in fresh processes, for its load time and memory. The table shows
    medians with their 95 % intervals; --json has every sample.
    """
    from llmopt.bundle.writer import check_destination

    output, force = options["output"], options["force"]
    require_there(*artifacts)
    if output is not None:
        check_destination(output, force=force)
    with Progress() as progress:
        progress("starting")
        from llmopt.benchmark import measure

        result = measure(artifacts, _plan(artifacts, options), progress)
    if output is not None:
        _write(result, output, force=force)
    click.echo(result.to_json() if as_json else _table(result), nl=not as_json)


def _plan(artifacts: tuple[Path, ...], options: dict[str, Any]) -> Plan:
    from llmopt.benchmark import Plan, default_workload, parse_workload
    from llmopt.bundle.manifest import Manifest
    from llmopt.runtime.opening import artifact_of

    if options["workload"] is None:
        manifest = Manifest.read(artifact_of(artifacts[0]))
        workload = default_workload(manifest.task, manifest.model.max_length)
    else:
        workload = parse_workload(options["workload"])
    return Plan(workload, threads=options["threads"], repetitions=options["repetitions"])


def _write(result: BenchmarkResult, output: Path, *, force: bool) -> None:
    from llmopt.bundle.writer import staged_file

    with staged_file(output, force=force) as staging:
        staging.write_text(result.to_json(), encoding="utf-8")


def _table(result: BenchmarkResult) -> str:
    names = [
        name for name in _SHOWN if any(each.metric(name) is not None for each in result.artifacts)
    ]
    header = ["artifact", "size", *(_SHOWN[name][0] for name in names)]
    rows = [
        [each.path, size(each.size_bytes), *(_cell(each, name) for name in names)]
        for each in result.artifacts
    ]
    machine = result.machine
    title = f"{result.workload}, {result.threads} threads, {machine.processor}"
    return f"{title}\n{table(header, rows)}"


def _cell(artifact: ArtifactResult, name: str) -> str:
    metric = artifact.metric(name)
    return "-" if metric is None else _measured(metric, _SHOWN[name][1])


def _measured(metric: Metric, factor: float) -> str:
    """Return the median and half the width of its interval, where there are samples enough."""
    middle = digits(metric.median * factor)
    if metric.interval is None:
        return middle
    low, high = metric.interval
    return f"{middle} ± {digits((high - low) / 2 * factor, 2)}"
