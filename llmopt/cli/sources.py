"""The options that say how a source is read, for every command that reads one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

_OPTIONS: Final = (
    click.option(
        "--model",
        metavar="FILE.py:FACTORY",
        help="The function that makes the module a state_dict belongs to.",
    ),
    click.option(
        "--task",
        type=click.Choice(["generate", "embed", "encode", "raw"]),
        help="What the model is for.  [default: found out]",
    ),
    click.option(
        "--example-inputs",
        type=click.Path(path_type=Path),
        metavar="FILE.npz",
        help="What to call the module with while it is traced, one array per input.",
    ),
    click.option(
        "--max-length",
        type=click.IntRange(min=1),
        metavar="N",
        help="The most tokens of one sequence.  [default: the model's own limit]",
    ),
    click.option(
        "--trust-pickle",
        is_flag=True,
        help="Execute the code that a pickled file carries. Only for files you made yourself.",
    ),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Execute Python code that lies in a Hugging Face folder. Only where you have read it.",
    ),
)


def source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an argument for each field of `llmopt.frontend.source.SourceOptions`.

    The exception is ``dynamic_shapes``, which cannot be said in text.
    """
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
