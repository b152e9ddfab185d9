"""How long each kernel took: what TVM's machine calls before and after every call it makes.

Being told of a call costs more than most calls: a step of some hundred kernels, which takes a few
milliseconds, makes a thousand others that only prepare them, and would seem to take three times as
long. So what it costs is measured on those, which do next to nothing, and taken off: of them no
time is left, and of each kernel as much is taken off as one of them costs on average.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from llmopt.runtime.session import TimedOperator, TimedRun

_GO_ON: Final = 0  # VMInstrumentReturnKind.NO_OP
_PREPARING: Final = ("vm.builtin.", "shape_func")
"""What the machine calls to prepare a kernel: sizes, memory, weights out of their list."""


@dataclass(frozen=True)
class _KernelCall:
    """A kernel's call as it was seen, in seconds.

    Args:
        module: The source's.
        kernel: Name of the kernel.
        inside: Time between the notices of its start and its end.
        since: Time from the end of the kernel before to its own end.
        notices: Part of that spent in notices of its preparation.
        first: Whether there is no kernel before.
    """

    module: str
    kernel: str
    inside: float
    since: float
    notices: float
    first: bool

    def timed(self, cost: float) -> TimedOperator:
        """Return what the call took, less the ``cost`` of each notice, seconds."""
        inside = max(self.inside - cost, 0.0)
        since = self.since - self.notices - (cost if self.first else 2 * cost)
        return TimedOperator(self.module, self.kernel, inside, max(since, inside))


class Stopwatch:
    """Times the calls of a machine.

    Args:
        callers: Source modules of each call, in order, by function and kernel.

    Attributes:
        runs: What was timed, one entry for each function that was called.
        off: Whether nothing is timed any more.
    """

    def __init__(self, callers: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        self.runs: list[TimedRun] = []
        self.off = False
        self._callers = callers
        self._function = ""
        self._found: list[_KernelCall] = []
        self._calls: Counter[str] = Counter()
        self._costs: list[float] = []
        self._before = 0
        self._start = 0.0
        self._end: float | None = None

    @contextlib.contextmanager
    def running(self, function: str) -> Iterator[None]:
        """Take what is called inside for one run of ``function``."""
        self._function, self._found, self._calls = function, [], Counter()
        self._costs, self._before, self._end = [], 0, None
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        cost = sum(self._costs) / len(self._costs) if self._costs else 0.0
        operators = tuple(seen.timed(cost) for seen in self._found)
        told = 2 * cost * (len(self._costs) + len(operators))
        known = sum(operator.seconds for operator in operators)
        self.runs.append(TimedRun(max(spent - told, known), operators))

    def __call__(self, _function: Any, name: Any, before: Any, _result: Any, *_: Any) -> int:
        """Start before a call, and stop after it."""
        if self.off:
            return _GO_ON
        if before:
            self._start = time.perf_counter()
            return _GO_ON
        end = time.perf_counter()
        kernel = str(name)
        if kernel.startswith(_PREPARING):
            self._costs.append(end - self._start)
        else:
            self._stop(kernel, end)
        return _GO_ON

    def _stop(self, kernel: str, end: float) -> None:
        number = self._calls[kernel]
        self._calls[kernel] += 1
        modules = self._callers.get(self._function, {}).get(kernel, ())
        module = modules[number] if number < len(modules) else ""
        first = self._end is None
        since = self._start if self._end is None else self._end
        told = 0.0 if first else 2 * sum(self._costs[self._before :])
        seen = _KernelCall(module, kernel, end - self._start, end - since, told, first)
        self._found.append(seen)
        self._end, self._before = end, len(self._costs)
