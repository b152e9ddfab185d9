"""Errors on the command line: one line, what to do next, the exit code; never a traceback.

The exception is an exception that is none of ours: then the traceback is what helps.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from llmopt.errors import LlmoptError
from llmopt.lazy import extras_needed

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

INTERRUPTED: Final = 130
"""What shells report of a process that SIGINT ended."""


class InterruptedByUser(click.ClickException):
    """Ctrl-C. Every command writes its output in one piece at the end, so none is there."""

    exit_code = INTERRUPTED

    def __init__(self, message: str = "interrupted; nothing was written") -> None:
        super().__init__(message)


@contextlib.contextmanager
def told(arguments: Sequence[str]) -> Iterator[None]:
    """Print what ends the block early, and exit with its code.

    Args:
        arguments: The command line, to be shown where it has to be run again.
    """
    try:
        with _no_ctrl_c_is_lost(), extras_needed():
            yield
    except LlmoptError as error:
        _end(str(error), error.exit_code)
    except InterruptedByUser as error:
        click.echo(error.message, err=True)
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _end(_worded(error), error.exit_code)
    except click.Abort:
        click.echo("interrupted; nothing was written", err=True)
        sys.exit(INTERRUPTED)
    except Exception:  # noqa: BLE001 - the outermost frame: nobody else could say it
        _report_bug(arguments)
        sys.exit(1)


@contextlib.contextmanager
def _no_ctrl_c_is_lost() -> Iterator[None]:
    """Interrupt again after a Ctrl-C that struck where Python can only print what is raised.

    That is in finalizers and in callbacks of weak references, which run while modules are imported.
    """
    before, main = sys.unraisablehook, threading.get_ident()

    def again() -> None:
        time.sleep(0.01)  # out of the callback
        signal.pthread_kill(main, signal.SIGINT)  # wakes it, too

    def hook(unraisable: UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Thread(target=again, daemon=True).start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _end(message: str, code: int) -> None:
    click.echo("Error: " + " ".join(message.split()), err=True)
    sys.exit(code)


def _worded(error: click.ClickException) -> str:
    """Return click's message and where the help is."""
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    if context is None:
        return message
    return f"{message}; see `{context.command_path} --help`"


def _report_bug(arguments: Sequence[str]) -> None:
    traceback.print_exc(file=sys.stderr)
    command = shlex.join(["llmopt", *arguments])
    click.echo(
        "\nThis is a bug in llmopt, not in what you did. Please report it where you got llmopt "
        "from, with the lines above, the output of `llmopt doctor` and the command:\n"
        f"  cd {shlex.quote(str(Path.cwd()))} && {command}",
        err=True,
    )
