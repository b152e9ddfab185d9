"""``llmopt run``: text, embeddings or raw tensors out of an artifact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from llmopt.cli.artifacts import opened, trust_options
from llmopt.errors import UsageError

if TYPE_CHECKING:
    from llmopt.runtime import Runner

_SAMPLING: Final = ("chat", "max_new_tokens", "temperature", "top_p", "top_k", "seed")
_WRITING: Final = (*_SAMPLING[1:], "beams", "length_penalty")
"""What may go with --text, and with sounds, where the model writes for what it reads."""


@click.command("run")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("more", nargs=-1, metavar="")
@click.option("--prompt", metavar="TEXT", help="Continue this text.")
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="The images of --prompt, as pixel_values of the model's image processor.",
)
@click.option("--chat", is_flag=True, default=None, help="The prompt is said to an assistant.")
@click.option("--max-new-tokens", type=int, metavar="N", help="At most so many.  [default: 128]")
@click.option("--temperature", type=float, metavar="X", help="0 is greedy.  [default: 0]")
@click.option("--top-p", type=float, metavar="X", help="Keep the likeliest of this probability.")
@click.option("--top-k", type=int, metavar="N", help="Keep so many of the likeliest tokens.")
@click.option("--seed", type=int, metavar="N", help="The same seed gives the same text.")
@click.option("--beams", type=int, metavar="N", help="Search with so many.  [default: the model's]")
@click.option("--length-penalty", type=float, metavar="X", help="Above 0 favours long texts.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="TEXT...",
    help="Embed these sentences, or write what they become: translations, summaries.",
)
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Run the model on these arrays, by input name.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Where the outputs of --inputs go.",
)
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option("--threads", type=int, metavar="N", help="Threads.  [default: every usable core]")
@trust_options
def run_command(artifact: Path, more: tuple[str, ...], **options: Any) -> None:
    """Run ARTIFACT on a prompt, on sentences, or on arrays.

    It may be a bundle: what suits this machine is run.

    \b
    --prompt prints the continuation as it is made,
    --text one JSON array, or what it becomes, for each sentence,
    --inputs writes every output into another .npz file;
      of speech's features alone, it prints what was said.
    """  # noqa: D301 - \b keeps click from joining the lines
    asked = _mode(more, options)
    artifact = opened(artifact, options)
    from llmopt.runtime import load

    if asked == "inputs" and options["output"] is not None:
        _run_arrays(artifact, options)
        return
    runner = load(artifact, threads=options["threads"])
    if asked == "prompt":
        _write_text(runner, options)
    elif asked == "inputs":
        _transcribe(runner, options)
    elif runner.manifest.task == "text-to-text":
        _rewrite(runner, [*options["texts"], *more], options)
    else:
        _embed(runner, [*options["texts"], *more], options)


def _mode(more: Sequence[str], options: Mapping[str, Any]) -> str:
    """Return which of the three was asked for.

    Raises:
        UsageError: None or several, or an option that belongs to another.
    """
    modes = {"prompt": options["prompt"] is not None, "text": bool(options["texts"])}
    modes["inputs"] = options["inputs"] is not None
    asked = [name for name, wanted in modes.items() if wanted]
    if len(asked) != 1:
        several = " and ".join(f"--{name}" for name in asked)
        given = f"{several} exclude each other" if asked else "nothing to run on"
        raise UsageError(f"{given}; give one of --prompt, --text, or --inputs with -o")
    [mode] = asked
    if more and mode != "text":
        raise UsageError(f"{more[0]!r} is one argument too many; quote a prompt of several words")
    used = {
        "prompt": (*_SAMPLING, "images"),
        "inputs": ("output", "force", *_WRITING),
        "text": _WRITING,
    }
    for name in (*_SAMPLING, "images", "beams", "length_penalty", "output", "force"):
        left_out = options[name] is None or options[name] is False  # a seed of 0 is given
        if not left_out and name not in used.get(mode, ()):
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect with --{mode}; leave it out"
            )
    return mode


def _write_text(runner: Runner, options: Mapping[str, Any]) -> None:
    from llmopt.runtime.npz import read_images

    task = runner.manifest.task
    if task != "generate":
        other = "--text" if task in {"embed", "text-to-text"} else "--inputs"
        raise UsageError(
            f"{runner.folder}: made for task {task!r}, it does not continue text; use {other}"
        )
    wanted = {name: options[name] for name in _SAMPLING if options[name] is not None}
    images = None if options["images"] is None else read_images(options["images"])
    for piece in runner.stream(options["prompt"], images=images, **wanted):
        click.echo(piece, nl=False)
    click.echo()


def _rewrite(runner: Runner, texts: list[str], options: Mapping[str, Any]) -> None:
    for text in runner.generate(texts, **_wanted(options)):
        click.echo(text)


def _transcribe(runner: Runner, options: Mapping[str, Any]) -> None:
    from llmopt.runtime.npz import read_npz

    if runner.manifest.task != "speech-to-text":
        raise UsageError("--inputs writes arrays: say where with -o FILE.npz")
    feeds = read_npz(options["inputs"])
    if len(feeds) != 1:
        raise UsageError(
            f"{options['inputs']}: one array of features was expected, not {len(feeds)}"
        )
    for text in runner.transcribe(next(iter(feeds.values())), **_wanted(options)):
        click.echo(text)


def _wanted(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _WRITING if options[name] is not None}


def _embed(runner: Runner, texts: list[str], options: Mapping[str, Any]) -> None:
    for name in _wanted(options):
        flag = name.replace("_", "-")
        raise UsageError(f"--{flag} has no effect with --text where a model makes embeddings")
    for row in runner.embed(texts):
        click.echo(json.dumps([float(f"{value:.7g}") for value in row]))


def _run_arrays(artifact: Path, options: Mapping[str, Any]) -> None:
    from llmopt.artifact.writer import check_destination
    from llmopt.runtime import load
    from llmopt.runtime.npz import read_npz, write_npz

    for name in _wanted(options):
        raise UsageError(f"--{name.replace('_', '-')} has no effect with -o; leave it out")
    check_destination(options["output"], force=options["force"])
    feeds = read_npz(options["inputs"])
    found = load(artifact, threads=options["threads"]).run(feeds)
    write_npz(options["output"], found, force=options["force"])
    click.echo(f"wrote {', '.join(found)} to {options['output']}", err=True)
