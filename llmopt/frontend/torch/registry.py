"""torch's registry of ONNX decompositions, built once for a process.

``torch.onnx.export`` builds it in each call, which takes half a second.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def shared_registry() -> Iterator[None]:
    """Share one registry among exports; do nothing with a torch that keeps it elsewhere."""
    owner = _owner()
    original = vars(owner).get("from_torchlib")
    if not isinstance(original, classmethod):
        yield
        return
    owner.from_torchlib = staticmethod(functools.partial(_registry, original.__func__, owner))
    try:
        yield
    finally:
        owner.from_torchlib = original


def _owner() -> Any:
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        return object
    return ONNXRegistry


@functools.cache
def _registry(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the registry for an opset; nothing that llmopt calls writes to it."""
    return make(*args, **kwargs)
