"""A PyTorch module, live or from ``file.py:factory``, becomes a Program."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from llmopt.errors import (
    LlmoptError,
    SourceError,
    SourceNotFoundError,
    UnsupportedModelError,
    UsageError,
)
from llmopt.frontend.base import Source, SourceOptions
from llmopt.frontend.meaning import TracedModel, finish
from llmopt.frontend.reference import ModuleReference, evaluating
from llmopt.frontend.tensors import to_numpy
from llmopt.frontend.torch.examples import Tensors, dynamic_shapes, example_inputs
from llmopt.frontend.torch.outputs import output_names
from llmopt.frontend.torch.trace import trace_module
from llmopt.interface.facts import SourceRecord

_SPELLING: Final = "write file.py:factory, a function without arguments that returns the module"


def open_module(module: nn.Module, options: SourceOptions, name: str | None = None) -> Source:
    """Return the Program and the reference of a module.

    The module is traced and run in eval mode, then put back into its former mode.

    Args:
        module: The module.
        options: Example inputs, task and limits.
        name: Default name of the artifact; the class by default.

    Raises:
        UsageError: Example inputs are needed, or do not fit.
        UnsupportedModelError: The module cannot be traced with a dynamic batch and length.
    """
    family = type(module).__name__
    label = name or family
    _check_values(module, label)
    notes: tuple[str, ...] = ()
    if module.training:
        notes = ("the module was in training mode: it is compiled for inference",)
    with evaluating(module):
        inputs = example_inputs(module, options)
        named = inputs if isinstance(inputs, dict) else {str(i): t for i, t in enumerate(inputs)}
        free = dynamic_shapes(named)
        notes += fixed_notes(named, free)
        shapes = options.dynamic_shapes or _nested(module, inputs, free)
        with torch.no_grad():
            result = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
        outputs = output_names(result, label)
        traced = trace_module(module, inputs, shapes)
    names = [str(value.name) for value in traced.model.graph.inputs]
    positional = 0 if isinstance(inputs, dict) else len(inputs)
    traced_model = TracedModel(
        record=SourceRecord(label, "module", digest(module)),
        family=family,
        model=traced.model,
        outputs=outputs,
        expected=traced.expected,
        limit=traced.limit,
        reference=lambda out: ModuleReference(module, names, out, positional=positional),
        notes=notes,
    )
    return finish(traced_model, options)


def _nested(module: nn.Module, inputs: Tensors | tuple[Tensor, ...], free: dict[str, Any]) -> Any:
    """Return dynamic shapes in the structure of the call: ``*args`` and ``**kwargs`` nest."""
    import inspect

    parameters = inspect.signature(module.forward).parameters.values()
    if not isinstance(inputs, dict):
        return (tuple(free.values()),)
    extra = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    plain = {p.name for p in parameters}
    outside = {name: axes for name, axes in free.items() if name not in plain}
    inside = {name: axes for name, axes in free.items() if name in plain}
    return inside | ({extra: outside} if extra and outside else {})


def _check_values(module: nn.Module, label: str) -> None:
    bare = [name for name, p in module.named_parameters() if p.is_meta]
    if bare:
        raise UnsupportedModelError(
            label,
            [f"{len(bare)} parameters are on the meta device ({bare[0]}, ...)"],
            "load its weights first",
        )


def fixed_notes(inputs: Tensors, free: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note for each input with static dimensions."""
    return tuple(
        f"input {name!r}: dimensions {fixed} are fixed at {[tensor.shape[i] for i in fixed]}"
        for name, tensor in inputs.items()
        if (fixed := [i for i in range(tensor.dim()) if i not in free[name]])
    )


def digest(module: nn.Module) -> str:
    """Return the sha256 over names, shapes and numbers of parameters and persistent buffers."""
    combined = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            array = to_numpy(tensor)
            combined.update(f"{name} {array.dtype} {array.shape}\n".encode())
            combined.update(array.tobytes())
    return combined.hexdigest()


def open_factory(text: str, options: SourceOptions) -> Source:
    """Return the source of the module that ``file.py:factory`` returns.

    A factory may return ``(module, example_inputs)``; example inputs in the options take
    precedence.
    """
    module, inputs = call_factory(text)
    if options.example_inputs is None and inputs is not None:
        options = dataclasses.replace(options, example_inputs=inputs)
    return open_module(module, options, Path(text.rpartition(":")[0]).stem)


def load_factory(text: str) -> nn.Module:
    """Return the module that ``file.py:factory`` returns.

    Raises:
        SourceNotFoundError: The file does not exist.
        SourceError: The file cannot be imported, or the factory failed.
        UsageError: The factory does not exist, or does not return a module.
    """
    return call_factory(text)[0]


def call_factory(text: str) -> tuple[nn.Module, Any]:
    """Return the module of ``file.py:factory`` and its example inputs, or None."""
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not file or not name or path.suffix != ".py":
        raise UsageError(f"{text!r} does not name a factory; {_SPELLING}")
    if not path.is_file():
        raise SourceNotFoundError(path, _SPELLING)
    factory = _attribute(path, name)
    if isinstance(factory, nn.Module):
        return factory, None
    if not callable(factory):
        raise UsageError(f"{text}: {name} is a {type(factory).__name__}, not callable; {_SPELLING}")
    try:
        result = factory()
    except LlmoptError:
        raise
    except Exception as error:  # user code: it may raise anything
        raise SourceError(
            path, f"{name}() failed: {_brief(error)}", "fix it, then compile"
        ) from error
    module, inputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"{text}: {name}() returned a {type(module).__name__}, not an nn.Module; {_SPELLING}"
        )
    return module, inputs


def _attribute(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses and pickled classes look their module up
    with _importable(path.resolve().parent):
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # user code: it may raise anything
            sys.modules.pop(path.stem)
            if before is not None:
                sys.modules[path.stem] = before
            raise SourceError(
                path, f"cannot be imported: {_brief(error)}", "fix it, then compile"
            ) from error
    if not hasattr(module, name):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UsageError(
            f"{path}: no function {name!r}; it has {', '.join(public) or 'no function'}"
        )
    return getattr(module, name)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a file import its neighbours, as when Python runs it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
