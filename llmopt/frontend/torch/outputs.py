"""Names of the tensors that a module returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from llmopt.errors import UnsupportedModelError


def output_names(result: Any, label: str) -> list[str]:
    """Return the name of each tensor in a module's result, empty where it has none.

    Args:
        result: Tensor, or tensors in tuples, lists, dicts and dataclasses; None is skipped.
        label: Name of the model in messages.

    Raises:
        UnsupportedModelError: The result has something other than tensors.
    """
    if isinstance(result, Tensor):
        return [""]
    parts = _parts(result)
    if parts is None:
        raise UnsupportedModelError(
            label, [f"it returns a {type(result).__name__}"], "return tensors, in tuples or dicts"
        )
    names = []
    for key, part in parts:
        below = output_names(part, label)
        named = [f"{key}.{name or i}" for i, name in enumerate(below)]
        names += [key] if isinstance(part, Tensor) else named
    return names


def _parts(result: Any) -> list[tuple[str, Any]] | None:
    """Return the items of ``result`` by key; a tensor in a tuple has an empty key."""
    if hasattr(result, "_asdict"):  # a named tuple
        result = result._asdict()
    if dataclasses.is_dataclass(result) and not isinstance(result, type | Mapping):
        result = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        return [(str(key), part) for key, part in result.items() if part is not None]
    if isinstance(result, Sequence) and not isinstance(result, str):
        return [
            ("" if isinstance(part, Tensor) else str(i), part)
            for i, part in enumerate(result)
            if part is not None
        ]
    return None
