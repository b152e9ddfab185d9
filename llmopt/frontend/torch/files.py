"""PyTorch files: exported programs, TorchScript, state dicts and pickled modules."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from llmopt.errors import PickleRefusedError, SourceError, UnsupportedModelError, UsageError
from llmopt.frontend.base import Source, SourceOptions
from llmopt.frontend.torch.examples import example_inputs
from llmopt.frontend.torch.exported import Runnable, open_exported, runnable
from llmopt.frontend.torch.module import call_factory, open_module
from llmopt.frontend.torch.pt2 import load_exported
from llmopt.frontend.torch.trace import quiet
from llmopt.interface.facts import SourceRecord

_AGAIN: Final = "download or save it again"
_NESTS: Final = ("state_dict", "model_state_dict", "model")  # as training scripts save weights
_WRITES: Final = re.compile(rb"\b(save|from_file)\s*\(")
_DAMAGE: Final = (
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    OSError,
)
_LIMIT: Final = 5  # names in an error


def open_torch_file(path: Path, options: SourceOptions) -> Source:
    """Return the source of a ``.pt2``, ``.pt``, ``.pth`` or ``.bin`` file.

    Raises:
        PickleRefusedError: Reading the file would execute code, and it is not trusted.
        UsageError: The file has only weights, and ``options.model`` names no module.
        SourceError: The file is damaged, or its weights do not fit the module.
        UnsupportedModelError: The model cannot be traced.
    """
    names = _archive(path)
    if path.suffix == ".pt2" or any(n.endswith("/archive_format") for n in names):
        return _open_pt2(path, options)
    if any(name.endswith("/constants.pkl") for name in names):
        return _open_script(path, options, names)
    if options.model is not None:
        module, inputs = call_factory(options.model)
        if options.example_inputs is None and inputs is not None:
            options = dataclasses.replace(options, example_inputs=inputs)
    loaded = _load(path, trust=options.trust_pickle)
    if isinstance(loaded, nn.Module):
        return open_module(loaded, options, path.stem)
    tensors = _tensors(loaded)
    if not tensors:
        kind = type(loaded).__name__
        raise SourceError(path, f"a {kind} without named tensors", "save the module's state_dict()")
    if options.model is None:
        raise UsageError(
            f"{path}: a state_dict of {len(tensors)} tensors does not describe a model; pass "
            "--model FILE.py:factory (model= in Python), or compile a folder with a config.json"
        )
    _fill(path, module, tensors)
    return open_module(module, options, path.stem)


def _archive(path: Path) -> list[str]:
    """Return the names in a zip archive; none for torch's older format.

    Raises:
        SourceError: The file is neither, or is truncated.
    """
    with path.open("rb") as stream:
        start = stream.read(4)
    if start.startswith(b"\x80") and path.suffix != ".pt2":
        return []
    size = path.stat().st_size
    if start != b"PK\x03\x04":
        raise SourceError(path, f"not a PyTorch file ({size} bytes, first {start!r})", _AGAIN)
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except zipfile.BadZipFile as error:
        problem = f"truncated: the archive's directory is not within its {size} bytes"
        raise SourceError(path, problem, _AGAIN) from error


def _open_pt2(path: Path, options: SourceOptions) -> Source:
    exported = load_exported(path, trust=options.trust_pickle)
    return open_exported(exported, _record(path, "pt2"), options, runnable(exported, path.name))


def _record(path: Path, kind: str) -> SourceRecord:
    with path.open("rb") as stream:
        return SourceRecord(path.stem, kind, hashlib.file_digest(stream, "sha256").hexdigest())


def _open_script(path: Path, options: SourceOptions, names: list[str]) -> Source:
    """Convert a TorchScript program, unless its code reads or writes files."""
    from torch._export.converter import TS2EPConverter

    with zipfile.ZipFile(path) as archive:
        codes = [archive.read(n) for n in names if "/code/" in n and n.endswith(".py")]
    if any(_WRITES.search(code) for code in codes) and not options.trust_pickle:
        raise PickleRefusedError(path, "its program reads or writes files")
    try:
        with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
            script = torch.jit.load(  # type: ignore[no-untyped-call]
                str(path), map_location="cpu"
            ).eval()
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    with warnings.catch_warnings(action="ignore"):
        inputs = example_inputs(script, options)
    args = tuple(inputs.values()) if isinstance(inputs, dict) else inputs
    try:
        with quiet(), torch.no_grad():
            exported = TS2EPConverter(script, args).convert()
    except Exception as error:  # torch's converter raises whatever it meets
        raise UnsupportedModelError(
            path.name,
            [f"TorchScript that torch cannot convert: {_brief(error)}"],
            "compile the module itself, or save it with torch.export.save",
        ) from error
    names = [str(a.name) for a in script.forward.schema.arguments[1 : len(args) + 1]]
    run = Runnable(script, len(args), names)
    return open_exported(exported, _record(path, "torchscript"), options, run)


def _load(path: Path, *, trust: bool) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not trust:
            match = re.search(r"GLOBAL ([\w.]+)", str(error))
            needs = (
                f"it needs {match[1]} to be unpickled" if match else "it holds more than tensors"
            )
            raise PickleRefusedError(path, needs) from error
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        hint = (
            "run where its classes can be imported, or name their file with --model FILE.py:factory"
        )
        raise SourceError(path, f"cannot be unpickled ({_brief(error)})", hint) from error
    except (pickle.UnpicklingError, *_DAMAGE) as error:
        raise _damaged(path, error) from error


def _tensors(loaded: Any) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        return {}
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    nests = [loaded[nest] for nest in _NESTS if isinstance(loaded.get(nest), Mapping)]
    return tensors or (_tensors(nests[0]) if nests else {})


def _fill(path: Path, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load weights into a module; missing and unexpected ones are errors."""
    hint = "--model must name the factory of the module that was saved"
    try:
        result = module.load_state_dict(dict(tensors), strict=False, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        raise SourceError(path, " ".join(lines[:_LIMIT])[:300] or str(error), hint) from error
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:_LIMIT])}{', ...' * (len(keys) > _LIMIT)})"
        for what, keys in (("missing", result.missing_keys), ("unexpected", result.unexpected_keys))
        if keys
    ]
    if problems:
        raise SourceError(path, f"weights {' and '.join(problems)}", hint)


def _damaged(path: Path, error: BaseException) -> SourceError:
    size = path.stat().st_size
    return SourceError(path, f"damaged, {size} bytes ({_brief(error)})", _AGAIN)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
