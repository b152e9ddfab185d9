"""Progress on stderr: one line per stage with its duration, and a spinner on a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

import click


class Progress:
    """Callable that begins a stage, and ends the one before it.

    On a terminal the running stage has a spinner; elsewhere its name is printed at once, and its
    duration when it ends.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._stage = ""
        self._start = 0.0
        self._spinner: Any = None

    def __enter__(self) -> Self:
        """Return the progress itself, with no stage running."""
        return self

    def __call__(self, stage: str) -> None:
        """Begin ``stage``."""
        self._end(f"{self._duration():.1f} s")
        self._stage, self._start = stage, time.perf_counter()
        if not self._is_terminal:
            click.echo(f"{stage} … ", nl=False, err=True)
            return
        from rich.console import Console

        self._spinner = Console(stderr=True, highlight=False).status(stage)
        self._spinner.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """End the running stage."""
        self._end(f"{self._duration():.1f} s" if kind is None else "stopped")

    def _duration(self) -> float:
        return time.perf_counter() - self._start

    def _end(self, result: str) -> None:
        if not self._stage:
            return
        if self._spinner is not None:
            self._spinner.stop()
            click.echo(f"{self._stage} … ", nl=False, err=True)
        click.echo(result, err=True)
        self._stage, self._spinner = "", None
