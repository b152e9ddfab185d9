"""``llmopt evaluate``: what an artifact lost against its source, with standard errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from llmopt.cli.artifacts import all_opened, is_artifact, trust_options
from llmopt.cli.progress import Progress
from llmopt.cli.text import echo_json, table
from llmopt.errors import SourceError, SourceNotFoundError

if TYPE_CHECKING:
    from llmopt.evaluation import Evaluation, Results

SCHEMA = 1
_WORDS: Final = {
    "kl_mean": "mean KL divergence, nats",
    "kl_p99": "99th percentile of it, nats",
    "top1": "same most likely token, share",
    "perplexity": "perplexity of the artifact",
    "perplexity_reference": "perplexity of the reference",
    "cosine_mean": "mean cosine",
    "cosine_min": "lowest cosine",
}


@click.command("evaluate")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--reference",
    required=True,
    metavar="SOURCE|ARTIFACT",
    help="What it was compiled from, or another artifact of the same model.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text to compare on.  [default: what the artifact writes itself]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@trust_options
def evaluate_command(
    artifact: Path,
    reference: str,
    text: Path | None,
    as_json: bool,  # noqa: FBT001 - click
    **trusted: Any,
) -> None:
    """Measure what an artifact lost against its source.

    For a language model: KL divergence, agreement on the most likely token, and perplexity,
    each with its standard error. For any other: the cosine of its vectors to the reference's.
    """
    compared = [artifact, Path(reference)] if is_artifact(Path(reference)) else [artifact]
    folders = all_opened(compared, trusted)
    content = None if text is None else _read(text)
    with Progress() as progress:
        result = _evaluate(folders, reference, content, progress)
    values = dataclasses.asdict(result.result)
    about = {"artifact": str(artifact), "reference": reference, "text": result.text}
    if as_json:
        echo_json({"schema": SCHEMA} | about | values)
        return
    click.echo(f"{artifact} against {reference}, on {result.text}\n")
    click.echo(table(["", "value", "standard error"], _rows(values)))


def _read(path: Path) -> str:
    hint = "--text takes a file of plain text"
    if not path.is_file():
        raise SourceNotFoundError(path, hint)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(path, f"not UTF-8 text ({error.reason})", hint) from error


def _evaluate(
    folders: Sequence[Path], source: str, text: str | None, progress: Progress
) -> Evaluation:
    """Compare the first folder with the second, or with ``source`` where there is one alone."""
    progress("starting")
    from llmopt.evaluation import evaluate, require_one_model, runner_results
    from llmopt.runtime import load

    candidate = load(folders[0])
    require_one_model(candidate)  # before the reference is opened, which takes long
    progress("opening the reference")
    others = [runner_results(load(folder)) for folder in folders[1:]]
    wanted = others[0] if others else _source(source)
    progress("comparing")
    return evaluate(candidate, wanted, text)


def _source(source: str) -> Results:
    from llmopt.evaluation import source_results
    from llmopt.frontend.base import SourceOptions
    from llmopt.frontend.source import open_source
    from llmopt.ir.components import edge

    opened = open_source(source, SourceOptions())
    return source_results(edge(opened.program), opened.reference)


def _rows(values: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, words in _WORDS.items():
        value = values.get(name)
        if value is None:
            continue
        estimate = value if isinstance(value, dict) else {"value": value, "error": None}
        error = estimate["error"]
        rows.append([words, f"{estimate['value']:.4g}", "-" if error is None else f"{error:.2g}"])
    return rows
