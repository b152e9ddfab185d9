"""Running artifacts on a device, with what a device has: ``python -m llmopt.runtime``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from llmopt.errors import LlmoptError, UsageError

INTERRUPTED: Final = 130
_SAMPLING: Final = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments ask for and return the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    parser = _parser()
    try:
        asked = parser.parse_args(arguments)
        return _run(asked)
    except LlmoptError as error:
        sys.stderr.write(f"Error: {' '.join(str(error).split())}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llmopt.runtime",
        description="Run an artifact that llmopt compiled.",
        epilog="Exit codes: 0 ok, 1 the work failed, 2 usage, 3 backend or device missing, "
        "130 interrupted.",
    )
    parser.add_argument("artifact", type=Path, help="what `llmopt compile` wrote")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--prompt", metavar="TEXT", help="continue this text")
    mode.add_argument("--text", nargs="+", metavar="TEXT", help="embed these sentences")
    mode.add_argument("--selftest", action="store_true", help="compare with the example it carries")
    mode.add_argument("--serve", action="store_true", help="answer OpenAI's requests over HTTP")
    parser.add_argument("--threads", type=int, metavar="N", help="threads; every usable core if not")
    one = parser.add_argument_group("with --prompt")
    one.add_argument("--chat", action="store_true", default=None, help="it is said to an assistant")
    one.add_argument("--max-new-tokens", type=int, metavar="N", help="at most so many; 128 if not")
    one.add_argument("--temperature", type=float, metavar="X", help="0, which is greedy, if not")
    one.add_argument("--top-p", type=float, metavar="X", help="the likeliest of this probability")
    one.add_argument("--top-k", type=int, metavar="N", help="so many of the likeliest tokens")
    one.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    test = parser.add_argument_group("with --selftest")
    test.add_argument("--json", action="store_true", default=None, help="print one JSON object")
    _add_serving(parser)
    return parser


def _add_serving(parser: argparse.ArgumentParser) -> None:
    serve = parser.add_argument_group("with --serve")
    serve.add_argument(
        "--host", metavar="ADDRESS", help="127.0.0.1 if not: this machine alone is answered"
    )
    serve.add_argument("--port", type=int, metavar="N", help="8000 if not; 0 takes a free one")
    serve.add_argument(
        "--queue", type=int, metavar="N", help="requests that wait for their turn; 64 if not"
    )


_BELONGS: Final = {
    **dict.fromkeys(("chat", *_SAMPLING), "prompt"),
    "json": "selftest",
    **dict.fromkeys(("host", "port", "queue"), "serve"),
}


def _run(asked: argparse.Namespace) -> int:
    mode = next(name for name in ("prompt", "text", "selftest", "serve") if _given(asked, name))
    for option, owner in _BELONGS.items():
        if _given(asked, option) and mode != owner:
            flag = option.replace("_", "-")
            raise UsageError(f"--{flag} has no effect with --{mode}; leave it out")
    if mode == "selftest":
        return _selftest(asked)
    if mode == "serve":
        return _serve(asked)
    from llmopt.runtime import load

    runner = load(asked.artifact, threads=asked.threads)
    if mode == "text":
        for row in runner.embed(asked.text):
            sys.stdout.write(json.dumps([float(f"{value:.7g}") for value in row]) + "\n")
        return 0
    names = ("chat", *_SAMPLING)
    options: Any = {name: getattr(asked, name) for name in names if _given(asked, name)}
    for piece in runner.stream(asked.prompt, **options):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _given(asked: argparse.Namespace, name: str) -> bool:
    value = getattr(asked, name)
    return value is not None and value is not False


def _selftest(asked: argparse.Namespace) -> int:
    from llmopt.runtime.selftest import selftest

    result = selftest(asked.artifact, asked.threads)
    text = json.dumps(result.to_json(), indent=2) if asked.json else str(result)
    sys.stdout.write(f"{text}\n")
    return 0 if result.passed else 1


def _serve(asked: argparse.Namespace) -> int:
    from llmopt.runtime.serving import serve

    names = ("host", "port", "queue")
    options: Any = {name: getattr(asked, name) for name in names if _given(asked, name)}
    return serve(asked.artifact, threads=asked.threads, **options)


if __name__ == "__main__":
    sys.exit(main())
