"""``llmopt run``: generate text, embeddings or raw tensors with an artifact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from llmopt.cli.artifacts import artifact_folder, trust_options
from llmopt.errors import UsageError

if TYPE_CHECKING:
    from llmopt.runtime import Runner

_SAMPLING: Final = ("chat", "max_new_tokens", "temperature", "top_p", "top_k", "seed")
_GENERATION: Final = (*_SAMPLING[1:], "beams", "length_penalty")
"""Options of --text, and of audio features, with an encoder-decoder."""


@click.command("run")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("more", nargs=-1, metavar="")
@click.option("--prompt", metavar="TEXT", help="Text to continue.")
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Images for --prompt, as the pixel_values of the model's image processor.",
)
@click.option("--chat", is_flag=True, default=None, help="Treat the prompt as a user message.")
@click.option("--max-new-tokens", type=int, metavar="N", help="Tokens to generate.  [default: 128]")
@click.option("--temperature", type=float, metavar="X", help="Greedy decoding at 0.  [default: 0]")
@click.option("--top-p", type=float, metavar="X", help="Nucleus sampling with total probability X.")
@click.option("--top-k", type=int, metavar="N", help="Keep only the N most likely tokens.")
@click.option("--seed", type=int, metavar="N", help="Random seed, for reproducible text.")
@click.option("--beams", type=int, metavar="N", help="Number of beams.  [default: the model's]")
@click.option("--length-penalty", type=float, metavar="X", help="Above 0 favours longer texts.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="TEXT...",
    help="Sentences to embed, or to translate or summarize with an encoder-decoder.",
)
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Arrays to run the model on, by input name.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="File for the outputs of --inputs.",
)
@click.option("--force", is_flag=True, help="Overwrite an existing output.")
@click.option("--threads", type=int, metavar="N", help="Threads.  [default: all usable cores]")
@trust_options
def run_command(artifact: Path, more: tuple[str, ...], **options: Any) -> None:
    """Run ARTIFACT on a prompt, on sentences, or on arrays.

    ARTIFACT may be a bundle; the variant for this machine is run.

    \b
    --prompt streams the continuation,
    --text prints a JSON array, or the generated text, for each sentence,
    --inputs writes every output to another .npz file,
      or prints the transcript of speech features.
    """  # noqa: D301 - \b keeps click from joining the lines
    mode = _mode(more, options)
    artifact = artifact_folder(artifact, options)
    from llmopt.runtime import load

    if mode == "inputs" and options["output"] is not None:
        _run_arrays(artifact, options)
        return
    runner = load(artifact, threads=options["threads"])
    if mode == "prompt":
        _write_text(runner, options)
    elif mode == "inputs":
        _transcribe(runner, options)
    elif runner.manifest.task == "text-to-text":
        _rewrite(runner, [*options["texts"], *more], options)
    else:
        _embed(runner, [*options["texts"], *more], options)


def _mode(more: Sequence[str], options: Mapping[str, Any]) -> str:
    """Return the mode: ``"prompt"``, ``"text"`` or ``"inputs"``.

    Raises:
        UsageError: No mode or several, or an option of another mode.
    """
    modes = {"prompt": options["prompt"] is not None, "text": bool(options["texts"])}
    modes["inputs"] = options["inputs"] is not None
    chosen = [name for name, is_set in modes.items() if is_set]
    if len(chosen) != 1:
        several = " and ".join(f"--{name}" for name in chosen)
        problem = f"{several} are mutually exclusive" if chosen else "nothing to run on"
        raise UsageError(f"{problem}; give one of --prompt, --text, or --inputs with -o")
    [mode] = chosen
    if more and mode != "text":
        raise UsageError(f"unexpected argument {more[0]!r}; quote a prompt of several words")
    used = {
        "prompt": (*_SAMPLING, "images"),
        "inputs": ("output", "force", *_GENERATION),
        "text": _GENERATION,
    }
    for name in (*_SAMPLING, "images", "beams", "length_penalty", "output", "force"):
        omitted = options[name] is None or options[name] is False  # a seed of 0 counts as given
        if not omitted and name not in used.get(mode, ()):
            raise UsageError(f"--{name.replace('_', '-')} has no effect with --{mode}; omit it")
    return mode


def _write_text(runner: Runner, options: Mapping[str, Any]) -> None:
    from llmopt.runtime.npz import read_images

    task = runner.manifest.task
    if task != "generate":
        other = "--text" if task in {"embed", "text-to-text"} else "--inputs"
        raise UsageError(
            f"{runner.folder}: --prompt needs task 'generate', not {task!r}; use {other}"
        )
    sampling = {name: options[name] for name in _SAMPLING if options[name] is not None}
    images = None if options["images"] is None else read_images(options["images"])
    for piece in runner.stream(options["prompt"], images=images, **sampling):
        click.echo(piece, nl=False)
    click.echo()


def _rewrite(runner: Runner, texts: list[str], options: Mapping[str, Any]) -> None:
    for text in runner.generate(texts, **_generation(options)):
        click.echo(text)


def _transcribe(runner: Runner, options: Mapping[str, Any]) -> None:
    from llmopt.runtime.npz import read_npz

    if runner.manifest.task != "speech-to-text":
        raise UsageError("--inputs needs -o FILE.npz for the model's outputs")
    feeds = read_npz(options["inputs"])
    if len(feeds) != 1:
        raise UsageError(f"{options['inputs']}: expected one array of features, not {len(feeds)}")
    for text in runner.transcribe(next(iter(feeds.values())), **_generation(options)):
        click.echo(text)


def _generation(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _GENERATION if options[name] is not None}


def _embed(runner: Runner, texts: list[str], options: Mapping[str, Any]) -> None:
    for name in _generation(options):
        flag = name.replace("_", "-")
        raise UsageError(f"--{flag} has no effect with --text on an embedding model; omit it")
    for row in runner.embed(texts):
        click.echo(json.dumps([float(f"{value:.7g}") for value in row]))


def _run_arrays(artifact: Path, options: Mapping[str, Any]) -> None:
    from llmopt.artifact.writer import check_destination
    from llmopt.runtime import load
    from llmopt.runtime.npz import read_npz, write_npz

    for name in _generation(options):
        raise UsageError(f"--{name.replace('_', '-')} has no effect with -o; omit it")
    check_destination(options["output"], force=options["force"])
    feeds = read_npz(options["inputs"])
    outputs = load(artifact, threads=options["threads"]).run(feeds)
    write_npz(options["output"], outputs, force=options["force"])
    click.echo(f"wrote {', '.join(outputs)} to {options['output']}", err=True)
