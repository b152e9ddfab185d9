"""What the compiler is doing, and how long each stage took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from llmopt.compiler.artifact import Progress


class Clock:
    """Tells what is being done, and remembers how long each stage took.

    Args:
        progress: Told the name of each stage as it begins.

    Attributes:
        stages: Seconds by name; a stage that came twice counts both times.
    """

    def __init__(self, progress: Progress = lambda _: None) -> None:
        self.stages: dict[str, float] = {}
        self._progress = progress

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure what happens inside."""
        self._progress(stage)
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.stages[stage] = self.stages.get(stage, 0.0) + spent
