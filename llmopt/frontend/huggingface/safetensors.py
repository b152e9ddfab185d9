"""Safetensors checkpoints: the header is parsed and checked; each tensor is one file read.

Layout of a file (little-endian)::

    8 bytes: N | N bytes: JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}} | data

The data section has no holes and no overlaps, and ends where the file ends.
Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmopt.errors import LlmoptError, SourceError
from llmopt.frontend.base import unreadable

_AGAIN = "download or convert it again"
_PART = 1 << 22  # elements converted at once
_HEADER_LIMIT = 100_000_000  # bytes; the format's own bound
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@dataclass(frozen=True)
class StoredTensor:
    """The location and type of one tensor.

    Attributes:
        file: File of the tensor.
        dtype: Element type.
        shape: Shape.
        offset: First byte, counted from the start of the file.
    """

    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        """Size in the file."""
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsCheckpoint:
    """The tensors of one or more safetensors files.

    Args:
        path: Path that the user gave.
        files: Files and, if there is an index, the names it lists for each.

    Raises:
        SourceError: A file is truncated or damaged, or lacks tensors that the index lists.
    """

    def __init__(self, path: Path, files: Mapping[Path, frozenset[str] | None]) -> None:
        self.path = path
        self._tensors: dict[str, StoredTensor] = {}
        for file, listed in files.items():
            tensors = parse_header(file)
            check_listed(file, listed, tensors)
            self._tensors |= tensors

    def names(self) -> Collection[str]:
        """Return the name of every tensor."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """Return the numpy name of a tensor's element type."""
        return self._tensors[name].dtype.name

    def read(self, name: str) -> np.ndarray:
        """Return a fresh array with the tensor.

        Raises:
            SourceError: The file was changed since it was opened, or cannot be read.
        """
        tensor = self._tensors[name]
        return self._part(name, 0, prod(tensor.shape)).reshape(tensor.shape)

    def read_float32(self, name: str) -> np.ndarray:
        """Return a fresh float32 array; a narrower type is converted piece by piece.

        Raises:
            SourceError: The file was changed since it was opened, or cannot be read.
        """
        shape = self.shape(name)
        if self._tensors[name].dtype == np.float32:
            return self.read(name)
        out = np.empty(prod(shape), np.float32)
        for start in range(0, out.size, _PART):
            part = out[start : start + _PART]
            part[:] = self._part(name, start, part.size)
        return out.reshape(shape)

    def _part(self, name: str, start: int, count: int) -> np.ndarray:
        """Return ``count`` elements from ``start`` on."""
        tensor = self._tensors[name]
        offset = tensor.offset + start * tensor.dtype.itemsize
        try:
            # a plain read, not a mapping: no page of the file stays resident in the process
            flat = np.fromfile(tensor.file, tensor.dtype, count, offset=offset)
        except OSError as error:
            raise unreadable(tensor.file, error) from error
        if flat.size != count:
            problem = f"{name} ended after {start + flat.size} of {prod(tensor.shape)} elements"
            raise SourceError(tensor.file, problem, "it changed while it was read; compile again")
        return flat


def check_listed(file: Path, listed: frozenset[str] | None, names: Collection[str]) -> None:
    """Refuse a shard that lacks tensors listed by the index.

    Raises:
        SourceError: Tensors are missing; the message has their number and the first.
    """
    missing = sorted((listed or frozenset()).difference(names))
    if missing:
        problem = f"lacks {len(missing)} tensors that the index lists, first {missing[0]!r}"
        raise SourceError(file, problem, _AGAIN)


def parse_header(file: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a safetensors file, checked against the file's size.

    Raises:
        SourceError: The file is truncated or its header is damaged.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            _check_length(file, length, size)
            raw = stream.read(length)
    except OSError as error:
        raise unreadable(file, error) from error
    start = 8 + length
    entries = _parse_json(file, raw)
    tensors = {name: _tensor(file, name, entry, start) for name, entry in entries.items()}
    _check_layout(file, tensors, (start, size))
    return tensors


def _check_length(file: Path, length: int, size: int) -> None:
    if size < 8:
        raise SourceError(file, f"truncated: {size} bytes, the header alone has 8", _AGAIN)
    if length > _HEADER_LIMIT:
        raise SourceError(file, f"damaged: implausible header size of {length} bytes", _AGAIN)
    if 8 + length > size:
        problem = f"truncated: the header needs {8 + length} bytes, the file has {size}"
        raise SourceError(file, problem, _AGAIN)


def _parse_json(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        problem = f"its header is not valid JSON ({str(error).splitlines()[0]})"
        raise SourceError(file, problem, _AGAIN) from error
    if not isinstance(header, dict):
        raise SourceError(file, "its header is not a JSON object", _AGAIN)
    header.pop("__metadata__", None)
    return header


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _tensor(file: Path, name: str, entry: Any, start: int) -> StoredTensor:
    dtype, shape, (begin, end) = _fields(file, name, entry)
    if dtype not in _DTYPES:
        problem = f"tensor {name!r} has dtype {dtype!r}, known: {', '.join(_DTYPES)}"
        raise SourceError(file, problem, "convert it to one of these")
    tensor = StoredTensor(file, _DTYPES[dtype], shape, start + begin)
    if tensor.size_bytes != end - begin:
        problem = (
            f"tensor {name!r} is {dtype} {list(shape)} = {tensor.size_bytes} bytes, "
            f"its offsets span {end - begin}"
        )
        raise SourceError(file, problem, _AGAIN)
    return tensor


def _fields(file: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Return (dtype, shape, (begin, end)), each of the type it must have."""
    damaged: LlmoptError = SourceError(file, f"the header entry of {name!r} is malformed", _AGAIN)
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        begin, end = offsets
    except (KeyError, TypeError, ValueError) as error:
        raise damaged from error
    sizes = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not isinstance(dtype, str) or any(type(size) is not int or size < 0 for size in sizes):
        raise damaged
    return dtype, tuple(shape), (begin, end)


def _check_layout(file: Path, tensors: Mapping[str, StoredTensor], span: tuple[int, int]) -> None:
    """Check that the tensors tile the data section: no hole, no overlap, no tail."""
    position, size = span
    for name, tensor in sorted(
        tensors.items(), key=lambda item: (item[1].offset, item[1].size_bytes)
    ):
        if tensor.offset != position:
            what = "overlaps the one before it" if tensor.offset < position else "follows a hole"
            problem = f"tensor {name!r} at byte {tensor.offset} {what} (expected {position})"
            raise SourceError(file, problem, _AGAIN)
        position += tensor.size_bytes
    if position != size:
        what = "truncated" if position > size else "has bytes after its last tensor"
        raise SourceError(file, f"{what}: expected {position} bytes, the file has {size}", _AGAIN)
