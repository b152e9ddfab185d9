"""The command that makes an artifact again."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from llmopt.compiler.artifact import CompileOptions
from llmopt.frontend.base import SourceOptions
from llmopt.passes.pipeline import text_of

_FLAGS: Final = {"plugins": "plugin"}
_LEFT_OUT: Final = frozenset({"force", "without"})
_FROM_PYTHON: Final = "GIVEN_IN_PYTHON"


def recipe(source: str, target: str, options: CompileOptions, reading: SourceOptions) -> str:
    """Return the command line, without the paths that lead to files.

    >>> from llmopt.quantization.schemes import Blockwise
    >>> options = CompileOptions(quantize=Blockwise(bits=4))
    >>> recipe("tiny.gguf", "onnxruntime-cpu", options, SourceOptions())
    'llmopt compile tiny.gguf --target onnxruntime-cpu --quantize w4'
    """
    words = ["llmopt", "compile", source or _FROM_PYTHON, "--target", target]
    for given in (options, reading):
        for field in dataclasses.fields(given):
            value = getattr(given, field.name)
            if field.name == "passes":
                words += _passes(options)
            elif field.name == "quantize":
                words += [] if value is None else ["--quantize", str(value)]
            elif field.name not in _LEFT_OUT and not _is_default(value, field):
                words += _spelled(_FLAGS.get(field.name, field.name).replace("_", "-"), value)
    return shlex.join(words)


def _passes(options: CompileOptions) -> list[str]:
    """Return the option that gives the pipeline, lowering passes that are left out in it too."""
    items = (*options.passes, *(f"-{name}" for name in sorted(options.without)))
    if items == ("default",):
        return []
    objects = [item for item in items if not isinstance(item, str)]
    unknown = ["--plugin", _FROM_PYTHON] if objects and not options.plugins else []
    return ["--passes", text_of(items), *unknown]


def _is_default(value: Any, field: dataclasses.Field[Any]) -> bool:
    return type(value) is type(field.default) and bool(value == field.default)


def _spelled(name: str, value: Any) -> Iterator[str]:
    """Yield an option as it is typed: once for each of several values."""
    if value is True:
        yield f"--{name}"
        return
    several = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    for one in value if several else [value]:
        yield f"--{name}"
        yield Path(one).name if isinstance(one, str | Path) and _is_file(one) else _text(one)


def _is_file(value: str | Path) -> bool:
    return isinstance(value, Path) or ".py" in value or value.endswith(".npz")


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str | int | float) else _FROM_PYTHON
