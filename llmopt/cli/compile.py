"""``llmopt compile``: compile a source into one artifact per target."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmopt.cli.failures import InterruptedByUser
from llmopt.cli.plugins import plugin_option
from llmopt.cli.progress import Progress
from llmopt.cli.sources import source_options
from llmopt.cli.text import echo_json
from llmopt.errors import UsageError

if TYPE_CHECKING:
    from llmopt.compiler import Artifact

SCHEMA = 1


@click.command("compile")
@click.argument("source")
@click.option(
    "--target",
    "targets",
    metavar="TARGET",
    multiple=True,
    required=True,
    help="Target to compile for; `llmopt targets` lists them. Repeatable.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Artifact to write; with several targets, the parent directory of their artifacts.  "
    "[default: <source>.<target>]",
)
@source_options
@click.option(
    "--quantize",
    metavar="SCHEME",
    help="Quantization scheme: w8, w6, w4, w8a8-dynamic; options in braces, as in w4{block=64}.",
)
@click.option(
    "--block", type=int, metavar="N", help="Weights that share a scale; short for w4{block=N}."
)
@click.option(
    "--max-kl",
    type=float,
    metavar="NATS",
    help="Fail if quantization exceeds this mean KL divergence from the source.",
)
@click.option(
    "--passes",
    default="default",
    show_default=True,
    metavar="TEXT",
    help="Pass pipeline, such as default,-merge-qkv,my-pass.",
)
@plugin_option
@click.option(
    "--require",
    multiple=True,
    metavar="KIND=all",
    help="Fail unless every attention, norm, rotary or activation is fused. Repeatable.",
)
@click.option(
    "--verify",
    type=click.Choice(["each", "final", "off"]),
    default="final",
    show_default=True,
    help="What to compare with the source: the Program after each pass and the artifact, the "
    "artifact alone, or nothing.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Largest batch size, for targets that fix it at compile time.",
)
@click.option(
    "--defer-engine",
    is_flag=True,
    help="Defer the steps that need the device to the first load on it.",
)
@click.option("--force", is_flag=True, help="Overwrite an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def compile_command(source: str, as_json: bool, **options: Any) -> None:  # noqa: FBT001 - click
    """Compile SOURCE for each TARGET, and verify the result.

    SOURCE is a Hugging Face folder, a .gguf, .onnx, .pt2 or .pt file, or module.py:factory, a
    function that returns an nn.Module.
    """
    with Progress() as progress:
        artifacts = _compile(source, options, progress)
    if as_json:
        echo_json({"schema": SCHEMA, "artifacts": [each.summary() for each in artifacts]})
    for artifact in artifacts:
        _report(artifact, as_json=as_json)


def _compile(source: str, options: dict[str, Any], progress: Progress) -> list[Artifact]:
    scheme = _scheme(options["quantize"], options["block"])
    targets = options["targets"]
    progress("starting")  # torch takes seconds to import
    from llmopt.compiler import CompileOptions, compile_source
    from llmopt.frontend.base import SourceOptions

    compiling = CompileOptions(**_chosen(CompileOptions, options) | {"quantize": scheme})
    reading = SourceOptions(**_chosen(SourceOptions, options))
    try:
        return compile_source(source, targets, options["output"], compiling, reading, progress)
    except KeyboardInterrupt as error:
        if len(targets) == 1:
            raise
        message = "interrupted; complete artifacts were kept, the others were not written"
        raise InterruptedByUser(message) from error


def _chosen(kind: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are fields of ``kind``."""
    return {f.name: options[f.name] for f in dataclasses.fields(kind) if f.name in options}


def _scheme(quantize: str | None, block: int | None) -> str | None:
    """Return the scheme with ``--block`` written into it."""
    if block is None:
        return quantize
    if quantize is None:
        raise UsageError("--block needs --quantize, such as --quantize w4")
    if "{" in quantize:
        raise UsageError(
            f"--block {block} conflicts with the options in {quantize!r}; set the block there"
        )
    return f"{quantize}{{block={block}}}"


def _report(artifact: Artifact, *, as_json: bool) -> None:
    """Print the notes and the summary of an artifact, and the command to try next."""
    from llmopt.cli.summary import summary

    notes = [f"{ran.name}: {note}" for ran in artifact.passes for note in ran.notes]
    for note in [*artifact.notes, *notes]:
        click.echo(f"Note: {note}", err=True)
    if not as_json:
        click.echo(summary(artifact))
    click.echo(f"Next: llmopt run {shlex.quote(str(artifact.path))} {_use(artifact)}", err=True)


def _use(artifact: Artifact) -> str:
    """Return the options of ``llmopt run`` that try an artifact out."""
    text = '--text "The sky is blue."'
    use = {"generate": '--prompt "The sky is"', "embed": text, "text-to-text": text}
    reads_text = (artifact.path / "tokenizer.json").is_file()
    if artifact.manifest.task == "speech-to-text" and reads_text:
        return "--inputs FEATURES.npz"
    return use.get(artifact.manifest.task if reads_text else "", "--inputs FILE.npz -o OUT.npz")
