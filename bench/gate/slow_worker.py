"""A worker of the gate whose every step takes longer by a share: ``slow_worker.py SHARE REQUEST``.

After a step it computes nothing for as long as the share says, without giving up its core, as a
slower kernel would.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from llmopt.benchmark.gate import worker
from llmopt.interface.stepping import Sequences
from llmopt.runtime import Runner


def slowed(call: Callable[..., Any], share: float) -> Callable[..., Any]:
    """Return a function that takes longer by ``share`` than ``call``, and returns the same."""

    def slow(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = call(*args, **kwargs)
        end = time.perf_counter()
        until = end + share * (end - start)
        while time.perf_counter() < until:
            pass
        return result

    return slow


def main(share: float, request: str) -> None:
    """Answer as a worker does, slowed."""
    Sequences.extend = slowed(Sequences.extend, share)  # type: ignore[method-assign]
    Runner.run = slowed(Runner.run, share)  # type: ignore[method-assign]
    worker.main(request)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2])
