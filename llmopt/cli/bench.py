"""``llmopt bench``: the speed of artifacts on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import click

from llmopt.cli.artifacts import artifact_folders, require_exists, trust_options
from llmopt.cli.progress import Progress
from llmopt.cli.text import digits, size, table
from llmopt.errors import UsageError

if TYPE_CHECKING:
    from llmopt.benchmark import ArtifactResult, BenchmarkResult, MeasurePlan, Metric

_COLUMNS: Final = {
    "prefill_tokens_per_s": ("prefill tok/s", 1.0),
    "decode_tokens_per_s": ("decode tok/s", 1.0),
    "encode_tokens_per_s": ("encode tok/s", 1.0),
    "ttft_s": ("first token ms", 1e3),
    "time_per_output_token_s": ("per token ms", 1e3),
    "encode_latency_s": ("per batch ms", 1e3),
    "run_latency_s": ("per run ms", 1e3),
    "load_s": ("load s", 1.0),
    "peak_rss_bytes": ("peak MB", 1e-6),
}
"""Heading and unit factor of each metric, in column order."""


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
    help="Workload: prefill=128,decode=64, encode=8x128 (batch x tokens), or FILE.npz with the "
    "model's inputs.  [default: by task]",
)
@click.option("--batch", type=int, metavar="N", help="Batch size.  [default: the workload's]")
@click.option("--threads", type=int, metavar="N", help="Threads.  [default: all usable cores]")
@click.option(
    "--repetitions", type=int, default=10, show_default=True, metavar="N", help="Measured runs."
)
@click.option("--profile", is_flag=True, help="Break the time down by module of the source.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Also write the JSON object, raw samples included, to a file.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a self-contained HTML report with charts and profile.",
)
@click.option("--force", is_flag=True, help="Overwrite existing output files.")
@trust_options
def bench_command(
    artifacts: tuple[Path, ...],
    as_json: bool,  # noqa: FBT001 - click
    **options: Any,
) -> None:
    """Measure the speed of artifacts, interleaving their runs.

    Load time and peak memory are measured in fresh processes. The table shows medians with 95 %
    confidence intervals, and the fraction of this machine's roofline that each phase reaches;
    --json has every sample.
    """
    require_exists(*artifacts)
    if options["html"] is not None and options["html"] == options["output"]:
        raise UsageError(f"--output and --html are the same file: {options['html']}")
    with contextlib.ExitStack() as stack:
        # Opened first, so that an unwritable path fails before minutes of measuring.
        files = {
            name: stack.enter_context(_opened(options[name], force=options["force"]))
            for name in ("output", "html")
            if options[name] is not None
        }
        result = _measured_result(artifacts, options)
        for name, file in files.items():
            file.write(result.to_json() if name == "output" else _page(result))
    _warn(result, profiled=options["profile"])
    click.echo(result.to_json() if as_json else _text(result), nl=not as_json)


@contextlib.contextmanager
def _opened(path: Path, *, force: bool) -> Iterator[TextIO]:
    from llmopt.artifact.writer import staged_file

    with staged_file(path, force=force) as staging, staging.open("w", encoding="utf-8") as file:
        yield file


def _measured_result(artifacts: tuple[Path, ...], options: dict[str, Any]) -> BenchmarkResult:
    with Progress() as progress:
        progress("starting")
        from llmopt.benchmark import explain, measure

        folders = artifact_folders(artifacts, options)
        plan = _plan(folders[0], options)
        result = measure(folders, plan, progress)
        profiled = options["profile"] or options["html"] is not None
        result = explain(result, plan, progress, profiled=profiled)
    pairs = zip(result.artifacts, artifacts, strict=True)
    return replace(result, artifacts=tuple(replace(one, path=str(path)) for one, path in pairs))


def _page(result: BenchmarkResult) -> str:
    from llmopt.benchmark.page import page

    return page(result.to_dict())


def _plan(first: Path, options: dict[str, Any]) -> MeasurePlan:
    from llmopt.artifact.manifest import Manifest
    from llmopt.benchmark import MeasurePlan, default_workload, parse_workload

    if options["workload"] is None:
        manifest = Manifest.read(first)
        workload = default_workload(manifest.task, manifest.model.max_length, options["batch"])
    else:
        workload = parse_workload(options["workload"], options["batch"])
    return MeasurePlan(workload, threads=options["threads"], repetitions=options["repetitions"])


def _warn(result: BenchmarkResult, *, profiled: bool) -> None:
    """Warn on stderr about unreliable numbers and missing profiles."""
    for artifact in result.artifacts if profiled else ():
        if not artifact.profile:
            click.echo(
                f"Note: {artifact.path}: no profile, because the runtime of {artifact.target} does "
                "not report operator times",
                err=True,
            )
    if result.steady is False:
        click.echo(
            "Warning: the samples still show a trend; warm-up may be incomplete, or the machine's "
            "clock changed: measure again, or raise --repetitions",
            err=True,
        )
    for artifact in result.artifacts:
        outliers = [
            f"{metric.name} {len(metric.outliers)} of {len(metric.samples)}"
            for metric in artifact.metrics
            if metric.outliers and metric.independent and not metric.name.endswith("per_s")
        ]
        if outliers:
            click.echo(
                f"Note: {artifact.path}: outliers, perhaps from other load: {', '.join(outliers)}",
                err=True,
            )


def _text(result: BenchmarkResult) -> str:
    parts = [_table(result), _limits(result), *map(_profile, result.artifacts)]
    return "\n\n".join(filter(None, parts))


def _limits(result: BenchmarkResult) -> str:
    """Return a table of the fraction of the roofline that each phase reached."""
    rows = [
        [
            artifact.path,
            phase["phase"],
            f"{100 * phase['fraction']:.0f} %",
            f"{phase['bound']}{' (cached)' if phase['in_cache'] else ''}",
            digits(phase["read_s"] * 1e3),
            "?" if phase["multiply_s"] is None else digits(phase["multiply_s"] * 1e3),
            digits(phase["seconds"] * 1e3),
        ]
        for artifact in result.artifacts
        for phase in artifact.roofline
    ]
    header = ["artifact", "phase", "of the limit", "bound by", "reading ms", "multiplying ms"]
    return table([*header, "took ms"], rows) if rows else ""


def _profile(artifact: ArtifactResult) -> str:
    """Return a table for each phase with the time of each part of the model."""
    blocks = []
    for phase in artifact.profile:
        total = phase["seconds"]
        rows = [
            [part or "(no module)", digits(spent * 1e3), f"{100 * spent / total:.1f} %"]
            for part, spent in phase["by_part"].items()
        ]
        outside = phase["outside_s"]
        rows.append(
            ["(outside operators)", digits(outside * 1e3), f"{100 * outside / total:.1f} %"]
        )
        duration = f"{digits(total * 1e3)} ms per profiled run"
        title = f"{artifact.path}, {phase['phase']}: {duration}"
        blocks.append(f"{title}\n{table(['part', 'ms', 'share'], rows)}")
    return "\n\n".join(blocks)


def _table(result: BenchmarkResult) -> str:
    names = [
        name for name in _COLUMNS if any(each.metric(name) is not None for each in result.artifacts)
    ]
    header = ["artifact", "size", *(_COLUMNS[name][0] for name in names)]
    rows = [
        [each.path, size(each.size_bytes), *(_cell(each, name) for name in names)]
        for each in result.artifacts
    ]
    machine = result.machine
    title = f"{result.workload}, {result.threads} threads, {machine.processor}"
    return f"{title}\n{table(header, rows)}"


def _cell(artifact: ArtifactResult, name: str) -> str:
    metric = artifact.metric(name)
    return "-" if metric is None else _measured(metric, _COLUMNS[name][1])


def _measured(metric: Metric, factor: float) -> str:
    """Return the median, with half the width of its interval if there are enough samples."""
    middle = digits(metric.median * factor)
    if metric.interval is None:
        return middle
    low, high = metric.interval
    return f"{middle} ± {digits((high - low) / 2 * factor, 2)}"
