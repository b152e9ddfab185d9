"""Running artifacts on a device, with what a device has: ``python -m llmopt.runtime``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from llmopt.errors import LlmoptError, SourceNotFoundError, UsageError

INTERRUPTED: Final = 130
_MODES: Final = ("prompt", "text", "selftest", "serve")
_SAMPLING: Final = ("chat", "max_new_tokens", "temperature", "top_p", "top_k", "seed")
_WRITING: Final = ("max_new_tokens", "beams")
_BELONGS: Final = {
    **dict.fromkeys((*_SAMPLING, "images"), ("prompt",)),
    "max_new_tokens": ("prompt", "text"),
    "beams": ("text",),
    "json": ("selftest",),
    **dict.fromkeys(("host", "port", "queue"), ("serve",)),
}
"""Which of the modes an option is for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments ask for and return the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    asked = _parser().parse_args(arguments)
    try:
        return _run(asked)
    except LlmoptError as error:
        sys.stderr.write(f"Error: {' '.join(str(error).split())}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the text has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def artifact_at(arguments: argparse.Namespace) -> Path:
    """Return the folder of the artifact that is asked for, a bundle unpacked.

    Raises:
        SourceNotFoundError: Nothing is there.
        LlmoptError: As `llmopt.runtime.opening.artifact_of` does.
    """
    if not arguments.artifact.exists():
        raise SourceNotFoundError(
            arguments.artifact, "give what `llmopt compile` wrote, or a bundle"
        )
    from llmopt.bundle.signing import trust_of
    from llmopt.runtime.opening import artifact_of

    trust = trust_of(arguments.key, arguments.certificate_chain or (), arguments.signature)
    return artifact_of(arguments.artifact, trust)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llmopt.runtime",
        description="Run an artifact that llmopt compiled.",
        epilog="Exit codes: 0 ok, 1 the work failed, 2 usage, 3 backend or device missing, "
        "130 interrupted.",
    )
    parser.add_argument("artifact", type=Path, help="what `llmopt compile` wrote, or a bundle")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--prompt", metavar="TEXT", help="continue this text")
    mode.add_argument("--text", nargs="+", metavar="TEXT", help="embed or rewrite these sentences")
    mode.add_argument("--selftest", action="store_true", help="compare with the example it carries")
    mode.add_argument("--serve", action="store_true", help="answer OpenAI's requests over HTTP")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads; every usable core if not"
    )
    _add_trust(parser)
    one = parser.add_argument_group("with --prompt")
    one.add_argument(
        "--images", type=Path, metavar="FILE.npz", help="pixel_values of the images in it"
    )
    one.add_argument(
        "--chat", action="store_true", default=None, help="treat the prompt as a user message"
    )
    one.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="number of tokens to generate; default 128"
    )
    one.add_argument(
        "--temperature", type=float, metavar="X", help="sampling temperature; default 0, greedy"
    )
    one.add_argument(
        "--top-p",
        type=float,
        metavar="X",
        help="sample from the most likely tokens of this total probability",
    )
    one.add_argument("--top-k", type=int, metavar="N", help="sample from the N most likely tokens")
    one.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    text = parser.add_argument_group("with --text, of a model that writes what a text becomes")
    text.add_argument(
        "--beams", type=int, metavar="N", help="number of beams; default: the model's"
    )
    test = parser.add_argument_group("with --selftest")
    test.add_argument("--json", action="store_true", default=None, help="print one JSON object")
    _add_serving(parser)
    return parser


def _add_trust(parser: argparse.ArgumentParser) -> None:
    signed = parser.add_argument_group("of a signed bundle")
    signed.add_argument("--key", type=Path, metavar="FILE", help="a public key: refuse any other's")
    signed.add_argument(
        "--certificate-chain",
        type=Path,
        action="append",
        metavar="FILE",
        help="certificates that the signer's leads to; repeatable",
    )
    signed.add_argument(
        "--signature", type=Path, metavar="FILE", help="the one beside the bundle if not"
    )


def _add_serving(parser: argparse.ArgumentParser) -> None:
    serve = parser.add_argument_group("with --serve")
    serve.add_argument(
        "--host", metavar="ADDRESS", help="127.0.0.1 if not, which no other machine reaches"
    )
    serve.add_argument("--port", type=int, metavar="N", help="8000 if not; 0 takes a free one")
    serve.add_argument(
        "--queue", type=int, metavar="N", help="requests that wait for their turn; 64 if not"
    )


def _run(arguments: argparse.Namespace) -> int:
    mode = next(name for name in _MODES if _given(arguments, name))
    for option, owners in _BELONGS.items():
        if _given(arguments, option) and mode not in owners:
            flag = option.replace("_", "-")
            raise UsageError(f"--{flag} has no effect with --{mode}; leave it out")
    run = {"prompt": _prompt, "text": _text, "selftest": _selftest, "serve": _serve}[mode]
    return run(arguments)


def _given(arguments: argparse.Namespace, name: str) -> bool:
    value = getattr(arguments, name)
    return value is not None and value is not False


def _options(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if _given(arguments, name)}


def _prompt(arguments: argparse.Namespace) -> int:
    from llmopt.runtime import load
    from llmopt.runtime.npz import read_images

    runner = load(artifact_at(arguments), threads=arguments.threads)
    if runner.manifest.task != "generate":
        task = runner.manifest.task
        raise UsageError(
            f"--prompt needs a text-generation artifact; {arguments.artifact} is for {task!r}"
        )
    images = None if arguments.images is None else read_images(arguments.images)
    for piece in runner.stream(arguments.prompt, images=images, **_options(arguments, _SAMPLING)):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _text(arguments: argparse.Namespace) -> int:
    from llmopt.runtime import load

    runner = load(artifact_at(arguments), threads=arguments.threads)
    options = _options(arguments, _WRITING)
    if runner.manifest.task == "text-to-text":
        for text in runner.generate(arguments.text, **options):
            sys.stdout.write(f"{text}\n")
        return 0
    if options:
        raise UsageError(
            f"{arguments.artifact} computes embeddings: omit --{min(options).replace('_', '-')}"
        )
    for row in runner.embed(arguments.text):
        sys.stdout.write(json.dumps([float(f"{value:.7g}") for value in row]) + "\n")
    return 0


def _selftest(arguments: argparse.Namespace) -> int:
    from llmopt.runtime.selftest import failure, selftest

    try:
        result = selftest(artifact_at(arguments), arguments.threads)
    except LlmoptError as error:
        if arguments.json:
            sys.stdout.write(json.dumps(failure(arguments.artifact, error), indent=2) + "\n")
        raise
    text = json.dumps(result.to_json(), indent=2) if arguments.json else str(result)
    sys.stdout.write(f"{text}\n")
    return 0 if result.passed else 1


def _serve(arguments: argparse.Namespace) -> int:
    from llmopt.runtime.serving import require_server

    require_server()
    from llmopt.runtime.serving.server import ListenOptions, serve

    place = ListenOptions(**_options(arguments, ("host", "port", "queue")))
    name = arguments.artifact.resolve().name
    return serve(artifact_at(arguments), name, place, arguments.threads)


if __name__ == "__main__":
    sys.exit(main())
