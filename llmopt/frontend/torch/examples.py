"""Example inputs to trace a module with: the user's, or built from its ``forward``."""

from __future__ import annotations

import inspect
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from llmopt.errors import PickleRefusedError, SourceError, SourceNotFoundError, UsageError
from llmopt.frontend.base import SourceOptions
from llmopt.frontend.input_names import role_of
from llmopt.interface.signature import Role

Tensors = dict[str, Tensor]
SIZES: Final = (2, 7)  # batch and tokens to trace with: different, and neither 0 nor 1
_ASK: Final = "pass --example-inputs FILE.npz (example_inputs= in Python), one array per input"
_KINDS: Final = inspect.Parameter


def example_inputs(module: nn.Module, options: SourceOptions) -> Tensors | tuple[Tensor, ...]:
    """Return inputs to trace ``module`` with, by name, or in order where it takes ``*args``.

    Raises:
        UsageError: They do not fit ``forward``, or cannot be built for it.
    """
    inputs = options.example_inputs
    if inputs is None:
        return _default_inputs(module)
    if isinstance(inputs, str | Path):
        inputs = load_arrays(Path(inputs))
    if not isinstance(inputs, Mapping):
        names = [p.name for p in _parameters(module) if p.kind is not _KINDS.VAR_POSITIONAL]
        tensors = tuple(_tensor(str(i), value) for i, value in enumerate(inputs))
        if len(tensors) > len(names):
            return tuple(
                _several(dict(zip(map(str, range(len(tensors))), tensors, strict=True))).values()
            )
        inputs = dict(zip(names, tensors, strict=False))
    _check_names(module, inputs)
    return _several({name: _tensor(name, value) for name, value in inputs.items()})


def load_arrays(path: Path) -> dict[str, Any]:
    """Return the arrays of an .npz file, without unpickling anything.

    Raises:
        PickleRefusedError: An array in the file is pickled.
        SourceError: The file is damaged, or not an .npz file.
    """
    if not path.is_file():
        raise SourceNotFoundError(path, "give an .npz file with one array per input")
    try:
        with path.open("rb") as stream:
            arrays = np.load(stream, allow_pickle=False)
            if isinstance(arrays, np.ndarray):
                raise SourceError(path, "a single array without a name", "save it with numpy.savez")
            return {name: arrays[name] for name in arrays}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        if "pickle" in str(error):
            raise PickleRefusedError(path, "an array in it is pickled") from error
        raise SourceError(
            path, f"not an .npz file ({error})", "write it again with numpy.savez"
        ) from error


def dynamic_shapes(inputs: Tensors) -> dict[str, Any]:
    """Return the dynamic dimensions of each input: batch and tokens."""
    return {
        name: dict.fromkeys(free_axes(name, t, inputs), torch.export.Dim.DYNAMIC)
        for name, t in inputs.items()
    }


def free_axes(name: str, tensor: Tensor, inputs: Tensors) -> list[int]:
    """Return the axes of an input that are batch or tokens.

    Integers are [B, S] and hidden states [B, S, E]. Of any other tensor the batch is dynamic; of
    masks and matrices so is every axis as long as the tokens.
    """
    if tensor.dim() < 2:
        return []
    mask = role_of(name) is Role.MASK or tensor.dtype is torch.bool
    if not mask and (tensor.dim() == 3 or not tensor.is_floating_point()):
        axes = [0, 1]
    elif mask or tensor.dim() == 2:
        matrices = [
            t for t in inputs.values() if t.dim() == 2 and (mask or not t.is_floating_point())
        ]
        lengths = {t.shape[1] for t in matrices}
        axes = [0, *(axis for axis in range(1, tensor.dim()) if tensor.shape[axis] in lengths)]
    else:
        axes = [0]
    return [axis for axis in axes if tensor.shape[axis] > 1]


def _default_inputs(module: nn.Module) -> Tensors:
    """Return inputs by the names of ``forward``'s parameters; the first is tokens."""
    vocabulary = _vocabulary(module)
    parameters = [p for p in _parameters(module) if p.kind is not _KINDS.VAR_KEYWORD]
    label = type(module).__name__
    if vocabulary is None or not parameters:
        raise UsageError(f"{label}: no token embedding to infer its inputs from; {_ASK}")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, SIZES, generator=generator)
    values = {
        Role.MASK: torch.ones(SIZES, dtype=torch.int64),
        Role.POSITIONS: torch.arange(SIZES[1]).repeat(SIZES[0], 1),
        Role.TOKEN_TYPES: torch.zeros(SIZES, dtype=torch.int64),
    }
    inputs: Tensors = {}
    for index, parameter in enumerate(parameters):
        role = Role.TOKENS if index == 0 else role_of(parameter.name)
        optional = parameter.default is not _KINDS.empty
        if role is Role.TOKENS and index == 0:
            inputs[parameter.name] = tokens
        elif role in values and not (optional and role is Role.POSITIONS):
            inputs[parameter.name] = values[role]
        elif not optional:
            raise UsageError(f"{label}: cannot infer the input {parameter.name!r}; {_ASK}")
    return _runnable(
        module, inputs, required={p.name for p in parameters if p.default is _KINDS.empty}
    )


def _runnable(module: nn.Module, inputs: Tensors, required: set[str]) -> Tensors:
    """Return ``inputs``, or the required ones alone, whichever the module runs on."""
    reason = ""
    fewer = {
        name: t
        for name, t in inputs.items()
        if name in required or t is next(iter(inputs.values()))
    }
    for candidate in (inputs, fewer):
        try:
            with torch.no_grad():
                module(**candidate)
        except Exception as error:  # noqa: BLE001 - a module may raise anything
            reason = reason or f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        else:
            return candidate
    raise UsageError(
        f"{type(module).__name__}: it does not run on {', '.join(inputs)} of shape "
        f"{list(SIZES)} ({reason}); {_ASK}"
    )


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    """Return the parameters of ``forward``; of a script, from its schema."""
    if not isinstance(module, torch.jit.ScriptModule):
        return list(inspect.signature(module.forward).parameters.values())
    script: Any = module
    return [
        _KINDS(
            a.name,
            _KINDS.POSITIONAL_OR_KEYWORD,
            default=a.default_value if a.has_default_value() else _KINDS.empty,
        )
        for a in script.forward.schema.arguments[1:]
    ]


def _vocabulary(module: nn.Module) -> int | None:
    """Return the rows of the first embedding."""
    for part in module.modules():
        kind = getattr(part, "original_name", type(part).__name__)  # scripts keep the class's name
        if isinstance(part, nn.Embedding) or kind == "Embedding":
            weight: Any = part.weight
            return int(weight.shape[0])
    return None


def _check_names(module: nn.Module, inputs: Mapping[str, Any]) -> None:
    parameters = _parameters(module)
    if any(p.kind is _KINDS.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters]
    missing = [
        p.name
        for p in parameters
        if p.default is _KINDS.empty
        and p.name not in inputs
        and p.kind is not _KINDS.VAR_POSITIONAL
    ]
    unknown = [name for name in inputs if name not in known]
    if missing or unknown:
        problem = f"lack {', '.join(missing)}" if missing else f"have unknown {', '.join(unknown)}"
        raise UsageError(
            f"example inputs {problem}; {type(module).__name__} takes {', '.join(known)}"
        )


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.array(value))
    raise UsageError(f"example input {name!r} is a {type(value).__name__}; give tensors or arrays")


def _several(inputs: Tensors) -> Tensors:
    """Repeat a batch of one: torch treats a dimension of size 1 as static."""
    batched = [t for t in inputs.values() if t.dim() > 1]
    if not batched or any(t.shape[0] != 1 for t in batched):
        return inputs
    return {
        name: t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() > 1 else t for name, t in inputs.items()
    }
