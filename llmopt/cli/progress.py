"""Progress on stderr: one line a stage with its seconds, a spinner where someone watches."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

import click


class Progress:
    """Call it with each stage as it begins; it ends the stage before.

    On a terminal the running stage has a spinner; elsewhere its name stands alone until its
    seconds are known.
    """

    def __init__(self) -> None:
        self._watched = sys.stderr.isatty()
        self._stage = ""
        self._start = 0.0
        self._spinner: Any = None

    def __enter__(self) -> Self:
        """Return it, idle."""
        return self

    def __call__(self, stage: str) -> None:
        """Begin ``stage``."""
        self._end(f"{self._spent():.1f} s")
        self._stage, self._start = stage, time.perf_counter()
        if not self._watched:
            click.echo(f"{stage} … ", nl=False, err=True)
            return
        from rich.console import Console

        self._spinner = Console(stderr=True, highlight=False).status(stage)
        self._spinner.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """End the stage that is running."""
        self._end(f"{self._spent():.1f} s" if kind is None else "stopped")

    def _spent(self) -> float:
        return time.perf_counter() - self._start

    def _end(self, result: str) -> None:
        if not self._stage:
            return
        if self._spinner is not None:
            self._spinner.stop()
            click.echo(f"{self._stage} … ", nl=False, err=True)
        click.echo(result, err=True)
        self._stage, self._spinner = "", None
