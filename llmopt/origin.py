"""Where a class is defined and where an exception was raised, as ``file:line``."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Final

PACKAGE: Final = "llmopt"
_IMPORTING: Final = ("<frozen importlib", f"{os.sep}importlib{os.sep}", "llmopt/passes/plugins.py")


def is_ours(cls: type[Any]) -> bool:
    """Whether a class is part of llmopt."""
    return cls.__module__.partition(".")[0] == PACKAGE


def defined_at(cls: type[Any]) -> str:
    """Return the file and line where a class is defined, or its module where there is no file."""
    try:
        return f"{_shown(source_of(cls))}:{inspect.findsource(cls)[1] + 1}"
    except (OSError, TypeError, KeyError):  # KeyError: where TVM has put its own getfile
        return f"{cls.__module__}.{cls.__qualname__}"


def source_of(cls: type[Any]) -> str:
    """Return the file that a class is defined in; empty where there is none."""
    return str(getattr(sys.modules.get(cls.__module__), "__file__", None) or "")


def raised_at(error: BaseException, preferred: str = "") -> str:
    """Return file and line where an exception came from: the last in a file, or the last at all."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_shown(error.filename)}:{error.lineno}"
    every = traceback.extract_tb(error.__traceback__)
    frames = [f for f in every if not any(part in f.filename for part in _IMPORTING)]
    inside = [frame for frame in frames if frame.filename == preferred]
    last = [*frames[-1:], *inside[-1:]][-1:]
    return f"{_shown(last[0].filename)}:{last[0].lineno}" if last else ""


def one_line(error: BaseException) -> str:
    """Return what an exception says, with its class, in one line.

    >>> one_line(ZeroDivisionError("division by zero"))
    'ZeroDivisionError: division by zero'
    """
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}".rstrip(": ")


def _shown(path: str) -> str:
    """Return a path from the working folder where it lies below it."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
