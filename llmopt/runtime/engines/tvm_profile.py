"""How long each kernel took: what TVM's machine calls before and after every call it makes."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from llmopt.runtime.session import TimedOperator, TimedRun

_GO_ON: Final = 0  # VMInstrumentReturnKind.NO_OP
_PREPARING: Final = ("vm.builtin.", "shape_func")
"""What the machine calls to prepare a kernel: sizes, memory, weights out of their list."""


class Stopwatch:
    """Times the calls of a machine.

    Args:
        callers: For each function and kernel, the source's module of each call, in order.

    Attributes:
        runs: What was timed, one entry for each function that was called.
        off: Whether nothing is timed any more.
    """

    def __init__(self, callers: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        self.runs: list[TimedRun] = []
        self.off = False
        self._callers = callers
        self._function = ""
        self._found: list[TimedOperator] = []
        self._calls: Counter[str] = Counter()
        self._start = 0.0
        self._end: float | None = None

    @contextlib.contextmanager
    def running(self, function: str) -> Iterator[None]:
        """Take what is called inside for one run of ``function``."""
        self._function, self._found, self._calls = function, [], Counter()
        self._end = None
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.runs.append(TimedRun(spent, tuple(self._found)))

    def __call__(self, _function: Any, name: Any, before: Any, _result: Any, *_: Any) -> int:
        """Start before a call, and stop after it."""
        if self.off or str(name).startswith(_PREPARING):
            return _GO_ON
        if before:
            self._start = time.perf_counter()
            return _GO_ON
        end = time.perf_counter()
        kernel = str(name)
        number = self._calls[kernel]
        self._calls[kernel] += 1
        modules = self._callers.get(self._function, {}).get(kernel, ())
        module = modules[number] if number < len(modules) else ""
        since = self._start if self._end is None else self._end
        self._found.append(TimedOperator(module, kernel, end - self._start, end - since))
        self._end = end
        return _GO_ON
