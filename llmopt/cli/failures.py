"""Errors on the command line: one line with the next step, and the exit code.

Only an exception that llmopt does not define, a bug, prints its traceback.
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

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

INTERRUPTED: Final = 130
"""The exit code that shells report for a process killed by SIGINT."""


class InterruptedByUser(click.ClickException):
    """Ctrl-C. Commands write their output atomically at the end, so there is none."""

    exit_code = INTERRUPTED

    def __init__(self, message: str = "interrupted; nothing was written") -> None:
        super().__init__(message)


@contextlib.contextmanager
def reported(arguments: Sequence[str]) -> Iterator[None]:
    """Report the exception that ends the block, and exit with its code.

    Args:
        arguments: Command line, quoted in bug reports.
    """
    try:
        with _no_lost_ctrl_c():
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
    except Exception:  # noqa: BLE001 - the outermost frame
        _report_bug(arguments)
        sys.exit(1)


@contextlib.contextmanager
def _no_lost_ctrl_c() -> Iterator[None]:
    """Interrupt again after a Ctrl-C that struck where exceptions cannot propagate.

    These are finalizers and callbacks of weak references, which run while modules are imported.
    """
    before, main = sys.unraisablehook, threading.get_ident()

    def again() -> None:
        time.sleep(0.01)  # after the callback has returned
        signal.pthread_kill(main, signal.SIGINT)  # wakes the main thread, too

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
    """Return click's message and a pointer to the help."""
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    if context is None:
        return message
    return f"{message}; see `{context.command_path} --help`"


def _report_bug(arguments: Sequence[str]) -> None:
    traceback.print_exc(file=sys.stderr)
    command = shlex.join(["llmopt", *arguments])
    click.echo(
        "\nThis is a bug in llmopt, not in your input. Please report it where you got "
        "llmopt, with the lines above, the output of `llmopt doctor` and the command:\n"
        f"  cd {shlex.quote(str(Path.cwd()))} && {command}",
        err=True,
    )
