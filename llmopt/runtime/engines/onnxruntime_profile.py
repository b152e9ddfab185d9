"""What ONNX Runtime wrote while it was profiled: a list of events, in Chrome's trace format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from llmopt.errors import LlmoptError
from llmopt.runtime.session import TimedOperator, TimedRun

_RUN: Final = "model_run"
_KERNEL: Final = "_kernel_time"


def read_profile(path: Path) -> list[TimedRun]:
    """Return the runs that a profile tells of, in order.

    Raises:
        LlmoptError: It is no profile.
    """
    try:
        events = json.loads(path.read_text(encoding="utf-8"))
        runs = sorted((e for e in events if e.get("name") == _RUN), key=_start)
        kernels = sorted((e for e in events if _is_kernel(e)), key=_start)
        return list(_runs(runs, kernels))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LlmoptError(f"onnxruntime's profile {path} cannot be read ({error})") from error


def _runs(
    runs: Sequence[Mapping[str, Any]], kernels: Sequence[Mapping[str, Any]]
) -> Iterator[TimedRun]:
    position = 0
    for run in runs:
        end = _start(run) + run["dur"]
        operators = []
        before = None
        while position < len(kernels) and _start(kernels[position]) <= end:
            operators.append(_operator(kernels[position], before))
            before = _end(kernels[position])
            position += 1
        yield TimedRun(run["dur"] * 1e-6, tuple(operators))


def _operator(event: Mapping[str, Any], before: float | None) -> TimedOperator:
    name = event["name"].removesuffix(_KERNEL)
    since = _start(event) if before is None else before
    seconds = (_end(event) - since) * 1e-6
    return TimedOperator(module_of(name), event["args"]["op_name"], event["dur"] * 1e-6, seconds)


def module_of(node: str) -> str:
    """Return the source's module of a node by its name.

    >>> module_of("layers.0.attention/MatMul_2"), module_of("MatMul_2")
    ('layers.0.attention', '')
    """
    return node.rpartition("/")[0]


def _is_kernel(event: Mapping[str, Any]) -> bool:
    return event.get("cat") == "Node" and str(event.get("name")).endswith(_KERNEL)


def _end(event: Mapping[str, Any]) -> float:
    return _start(event) + float(event["dur"])


def _start(event: Mapping[str, Any]) -> float:
    return float(event["ts"])
