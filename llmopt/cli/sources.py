"""The options for reading a source, for every command that reads one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

_OPTIONS: Final = (
    click.option(
        "--model",
        metavar="FILE.py:FACTORY",
        help="Function that returns the module for a state_dict.",
    ),
    click.option(
        "--task",
        type=click.Choice(["generate", "embed", "encode", "raw"]),
        help="Task of the model.  [default: inferred]",
    ),
    click.option(
        "--example-inputs",
        type=click.Path(path_type=Path),
        metavar="FILE.npz",
        help="Example inputs for tracing the module, one array per input.",
    ),
    click.option(
        "--max-length",
        type=click.IntRange(min=1),
        metavar="N",
        help="Longest sequence, in tokens.  [default: the model's limit]",
    ),
    click.option(
        "--trust-pickle",
        is_flag=True,
        help="Allow a pickled file to execute code. Only for files you created yourself.",
    ),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Execute the Python code in a Hugging Face folder. Only for code you have read.",
    ),
)


def source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each field of `llmopt.frontend.source.SourceOptions`.

    The exception is ``dynamic_shapes``, which has no textual form.
    """
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
