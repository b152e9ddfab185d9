"""torch's table of what ONNX has for its operators, made once for a process.

``torch.onnx.export`` makes it anew in each call, half a second that is the same every time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def kept_registry() -> Iterator[None]:
    """Let exports in here share one table; with a torch that keeps it elsewhere, do nothing."""
    owner = _owner()
    made = vars(owner).get("from_torchlib")
    if not isinstance(made, classmethod):
        yield
        return
    owner.from_torchlib = staticmethod(functools.partial(_registry, made.__func__, owner))
    try:
        yield
    finally:
        owner.from_torchlib = made


def _owner() -> Any:
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        return object
    return ONNXRegistry


@functools.cache
def _registry(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the table for an opset; nothing that llmopt calls writes to it."""
    return make(*args, **kwargs)
