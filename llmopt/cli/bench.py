"""``llmopt bench``: how fast artifacts are on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import click

from llmopt.cli.artifacts import all_opened, require_there, trust_options
from llmopt.cli.progress import Progress
from llmopt.cli.text import digits, size, table
from llmopt.errors import UsageError

if TYPE_CHECKING:
    from llmopt.benchmark import ArtifactResult, BenchmarkResult, MeasurePlan, Metric

_SHOWN: Final = {
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
    help="prefill=128,decode=64, encode=8x128 (rows x tokens), or FILE.npz with the model's "
    "inputs.  [default: by task]",
)
@click.option(
    "--batch", type=int, metavar="N", help="Sequences at once.  [default: the workload's]"
)
@click.option("--threads", type=int, metavar="N", help="Threads.  [default: every usable core]")
@click.option(
    "--repetitions", type=int, default=10, show_default=True, metavar="N", help="Of the workload."
)
@click.option("--profile", is_flag=True, help="Show where the time goes, by modules of the source.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Write the JSON object, raw samples included, to a file too.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a page with charts, profile included; it needs no network.",
)
@click.option("--force", is_flag=True, help="Replace the outputs if they exist.")
@trust_options
def bench_command(
    artifacts: tuple[Path, ...],
    as_json: bool,  # noqa: FBT001 - click
    **options: Any,
) -> None:
    """Measure how fast artifacts are, in turns.

    Each is also loaded in fresh processes, for its load time and memory. The table shows
    medians with their 95 % intervals, and how near to this machine's limits they come; --json
    has every sample.
    """
    require_there(*artifacts)
    if options["html"] is not None and options["html"] == options["output"]:
        raise UsageError(f"--output and --html both name {options['html']}")
    with contextlib.ExitStack() as stack:
        # Opened now: a place that cannot be written to is told before minutes of measuring.
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

        folders = all_opened(artifacts, options)
        plan = _plan(folders[0], options)
        result = measure(folders, plan, progress)
        profiled = options["profile"] or options["html"] is not None
        found = explain(result, plan, progress, profiled=profiled)
    named = zip(found.artifacts, artifacts, strict=True)
    return replace(found, artifacts=tuple(replace(of, path=str(path)) for of, path in named))


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
    """Say on stderr what makes the numbers doubtful, and what is missing."""
    for artifact in result.artifacts if profiled else ():
        if not artifact.profile:
            click.echo(
                f"Note: {artifact.path}: no profile: the engine of {artifact.target} does not "
                "tell how long each operator takes",
                err=True,
            )
    if result.steady is False:
        click.echo(
            "Warning: the samples still show a trend; the warm-up may not be over, or the "
            "machine's speed changed: measure again, or with more --repetitions",
            err=True,
        )
    for artifact in result.artifacts:
        far = [
            f"{metric.name} {len(metric.outliers)} of {len(metric.samples)}"
            for metric in artifact.metrics
            if metric.outliers and metric.independent and not metric.name.endswith("per_s")
        ]
        if far:
            click.echo(
                f"Note: {artifact.path}: something else may have run; outliers: {', '.join(far)}",
                err=True,
            )


def _text(result: BenchmarkResult) -> str:
    parts = [_table(result), _limits(result), *map(_profile, result.artifacts)]
    return "\n\n".join(filter(None, parts))


def _limits(result: BenchmarkResult) -> str:
    """Return how near to the machine's limits each phase came."""
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
    """Return where the time of each phase goes, by part of the model."""
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
        taken = f"{digits(total * 1e3)} ms a run while it is profiled"
        title = f"{artifact.path}, {phase['phase']}: {taken}"
        blocks.append(f"{title}\n{table(['part', 'ms', 'share'], rows)}")
    return "\n\n".join(blocks)


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
