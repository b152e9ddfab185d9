"""PyTorch checkpoints (``pytorch_model.bin``), read without executing code in them."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmopt.errors import PickleRefusedError, SourceError
from llmopt.frontend.base import unreadable
from llmopt.frontend.huggingface.safetensors import check_listed

_NESTS = ("state_dict", "model_state_dict", "model")  # as training scripts save weights
_AGAIN = "download or save it again"
# what torch's readers raise on damaged files
_DAMAGE = (RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError)
_RELOAD_BYTES = 64_000_000  # pages of a mapped file that may stay resident before it is unmapped


@dataclass(frozen=True)
class _Tensor:
    file: Path
    shape: tuple[int, ...]
    dtype: str


class TorchBinCheckpoint:
    """The tensors of one or more files written by ``torch.save``.

    Args:
        path: Path that the user gave.
        files: Files and, if there is an index, the names it lists for each.
        trust_pickle: Whether a file that needs unpickling may be unpickled.

    Raises:
        PickleRefusedError: A file needs unpickling and ``trust_pickle`` is false.
        SourceError: A file is damaged, or holds no tensors.
    """

    def __init__(
        self, path: Path, files: Mapping[Path, frozenset[str] | None], *, trust_pickle: bool = False
    ) -> None:
        self.path = path
        self._trust = trust_pickle
        self._entries: dict[str, _Tensor] = {}
        self._open: tuple[Path, Mapping[str, Any]] | None = None
        self._touched_bytes = 0
        for file, listed in files.items():
            tensors = load_tensors(file, trust_pickle=trust_pickle)
            check_listed(file, listed, tensors)
            for name, tensor in tensors.items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                self._entries[name] = _Tensor(file, tuple(tensor.shape), dtype)

    def names(self) -> Collection[str]:
        """Return the name of every tensor."""
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """Return the name of a tensor's element type."""
        return self._entries[name].dtype

    def read_float32(self, name: str) -> np.ndarray:
        """Return what `read` gives, as float32."""
        return self.read(name).astype(np.float32, copy=False)

    def read(self, name: str) -> np.ndarray:
        """Return a fresh array with the tensor.

        The file stays mapped between calls, so that its pickled index is not read again for each
        tensor; it is unmapped once many of its pages have been touched.

        Raises:
            SourceError: The file was changed since it was opened, or its element type has no
                numpy counterpart.
        """
        entry = self._entries[name]
        if self._open is None or self._open[0] != entry.file:
            self._open = (entry.file, load_tensors(entry.file, trust_pickle=self._trust))
            self._touched_bytes = 0
        tensor = self._open[1].get(name)
        if tensor is None or tuple(tensor.shape) != entry.shape:
            hint = "it changed while it was read; compile again"
            raise SourceError(entry.file, f"no longer holds {name!r} as it was", hint)
        array = _to_numpy(entry.file, name, tensor)
        self._touched_bytes += array.nbytes
        if self._touched_bytes > _RELOAD_BYTES:
            self._open = None
        return array


def load_tensors(file: Path, *, trust_pickle: bool) -> Mapping[str, Any]:
    """Return name -> torch.Tensor of a file, mapped where its format allows.

    Raises:
        PickleRefusedError: The file needs unpickling and ``trust_pickle`` is false.
        SourceError: The file is damaged, or has no tensors.
    """
    loaded = _load(file, trust_pickle=trust_pickle)
    if hasattr(loaded, "state_dict"):  # a pickled module: only ever after --trust-pickle
        loaded = loaded.state_dict()
    tensors = _tensors(loaded)
    if not tensors:
        problem = f"holds a {type(loaded).__name__} without named tensors"
        raise SourceError(file, problem, "save the model's state_dict() instead")
    return tensors


def _tensors(loaded: Any) -> dict[str, Any]:
    import torch

    if not isinstance(loaded, Mapping):
        return {}
    tensors = {
        str(name): value.detach()
        for name, value in loaded.items()
        if isinstance(value, torch.Tensor)
    }
    nests = [loaded[nest] for nest in _NESTS if isinstance(loaded.get(nest), Mapping)]
    return tensors or (_tensors(nests[0]) if nests else {})


def _load(file: Path, *, trust_pickle: bool) -> Any:
    import torch

    mapped = _mappable(file)
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols
            return torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        if not trust_pickle:
            raise PickleRefusedError(file, _needs(error)) from error
    except OSError as error:
        raise unreadable(file, error) from error
    except _DAMAGE as error:
        raise _damaged(file, error) from error
    return _load_trusted(file)


def _mappable(file: Path) -> bool:
    """Return whether the file is torch's zip archive; the older format has no storages to map.

    Raises:
        SourceError: The file is neither, is a TorchScript program, or is truncated.
    """
    with file.open("rb") as stream:
        start = stream.read(4)
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        problem = f"not a PyTorch checkpoint ({file.stat().st_size} bytes that start {start!r})"
        raise SourceError(file, problem, _AGAIN)
    if start.startswith(b"\x80"):
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        size = file.stat().st_size
        problem = f"truncated: the archive's directory is not within its {size} bytes"
        raise SourceError(file, problem, _AGAIN) from error
    if any(name.endswith("/constants.pkl") for name in names):
        hint = "compile the file itself, without a config.json next to it"
        raise SourceError(file, "is a TorchScript program, not a table of weights", hint)
    return True


def _load_trusted(file: Path) -> Any:
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=False)
    except (pickle.UnpicklingError, ImportError, *_DAMAGE) as error:
        raise _damaged(file, error) from error


def _needs(error: Exception) -> str:
    """Return the object that the pickle needs, if torch's refusal names it."""
    match = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it needs {match[1]} to be unpickled" if match else "it holds more than tensors"


def _damaged(file: Path, error: Exception) -> SourceError:
    first = str(error).strip().partition("\n")[0][:100]
    size = file.stat().st_size
    problem = f"not a readable PyTorch checkpoint of {size} bytes ({type(error).__name__}: {first})"
    return SourceError(file, problem, _AGAIN)


def _to_numpy(file: Path, name: str, tensor: Any) -> np.ndarray:
    """Return a copy of the tensor's values that shares no memory with the file."""
    import torch

    views: dict[Any, tuple[Any, Any]] = {
        torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
        torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
    }
    try:
        if tensor.dtype in views:
            bits, dtype = views[tensor.dtype]
            return np.array(tensor.contiguous().view(bits).numpy(), order="C").view(dtype)
        return np.array(tensor.numpy(), order="C")
    except (TypeError, RuntimeError) as error:
        problem = f"tensor {name!r} of type {tensor.dtype} has no numpy equivalent"
        raise SourceError(file, problem, "save it as float32") from error
