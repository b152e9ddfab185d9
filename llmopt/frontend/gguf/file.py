"""The header of a GGUF file: metadata and tensor table, checked against the file's size.

This reader replaces ``gguf.GGUFReader``, which keeps the whole file mapped, creates several Python
objects per vocabulary entry, and reports a truncated file as a numpy error.
Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.errors import SourceError, UnsupportedModelError
from llmopt.frontend.base import unreadable

_AGAIN = "download or convert it again"
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
# value type -> struct format; Source: the GGUF specification, enum gguf_metadata_value_type
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


@dataclass(frozen=True)
class GgufTensor:
    """The location and type of one tensor.

    Attributes:
        shape: Shape, outermost axis first (the file has it reversed).
        kind: ggml type: ``"F32"``, ``"Q4_K"``.
        offset: First byte, counted from the start of the file.
        row_bytes: Size of one row (the last axis) as stored.
    """

    shape: tuple[int, ...]
    kind: str
    offset: int
    row_bytes: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return prod(self.shape[:-1])

    @property
    def size_bytes(self) -> int:
        """Size in the file."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class GgufFile:
    """A parsed GGUF header.

    Attributes:
        path: The file.
        metadata: Every key with its value; arrays are lists.
        tensors: Every tensor by its ggml name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """Value of ``general.architecture``."""
        return str(self.metadata.get("general.architecture", ""))

    def value(self, key: str, default: Any = None) -> Any:
        """Return ``<architecture>.<key>``, or ``default`` where the file has none."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> Any:
        """Return a number that holds for every layer, from ``<architecture>.<key>``.

        Raises:
            SourceError: The key is missing (and there is no default), or not a number.
            UnsupportedModelError: The file has one number per layer, and they differ.
        """
        value = self.value(key, default)
        values = value if isinstance(value, list) else [value]
        if len(set(values)) > 1:
            raise self.unsupported(f"{key} differs from layer to layer: {sorted(set(values))}")
        if not values or not isinstance(values[0], int | float):
            problem = f"lacks the number {self.architecture}.{key}"
            raise SourceError(self.path, problem, "convert it again")
        return values[0]

    def unsupported(self, problem: str) -> UnsupportedModelError:
        """Return the error to raise when the file needs an unsupported feature."""
        hint = "compile the model from its Hugging Face folder instead"
        return UnsupportedModelError(str(self.path), [problem], hint)


def read_gguf(path: Path) -> GgufFile:
    """Return the header of a GGUF file.

    Raises:
        SourceError: The file is truncated, damaged, of an unsupported version, or one part of
            a split checkpoint.
    """
    try:
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # an empty file cannot be mapped
        raise SourceError(path, "is empty (0 bytes)", _AGAIN) from error
    except OSError as error:
        raise unreadable(path, error) from error
    with mapped:
        return _Parser(path, mapped).file()


class _Parser:
    """A position in a mapped file; every step is bounded by the file's end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def problem(self, text: str) -> SourceError:
        return SourceError(self.path, text, _AGAIN)

    def need(self, count: int) -> int:
        """Consume the next ``count`` bytes and return their offset."""
        start, end = self.at, self.at + count
        if end > len(self.data):
            size = len(self.data)
            raise self.problem(f"truncated: the header needs {end} bytes, the file has {size}")
        self.at = end
        return start

    def number(self, fmt: str) -> Any:
        return struct.unpack_from(fmt, self.data, self.need(struct.calcsize(fmt)))[0]

    def text(self) -> str:
        length = self.number("<Q")
        start = self.need(length)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.problem(f"damaged: the string at byte {start} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise self.problem(f"damaged: unknown value type {kind} at byte {self.at}")
        number = self.number(_SCALARS[kind])
        # the shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06
        return float(str(np.float32(number))) if kind == _FLOAT32 else number

    def array(self) -> list[Any]:
        kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            self.at = self.need(8 * count)  # each has a length: an absurd count is refused at once
            return [self.text() for _ in range(count)]
        if kind not in _SCALARS:
            raise self.problem(f"array of unsupported value type {kind} at byte {self.at}")
        dtype = np.dtype(_SCALARS[kind])
        start = self.need(dtype.itemsize * count)
        values: list[Any] = np.frombuffer(self.data[start : self.at], dtype).tolist()
        return values

    def file(self) -> GgufFile:
        self.magic()
        count, pairs = self.number("<Q"), self.number("<Q")
        metadata = self.table(pairs, lambda: self.value(self.number("<I")))
        self.refuse_split(metadata)
        infos = self.table(count, self.tensor_info)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self.problem(f"general.alignment is {alignment}, not a power of two")
        base = -(-self.at // alignment) * alignment
        tensors = {name: self.tensor(name, info, base) for name, info in infos.items()}
        self.check_layout(tensors)
        return GgufFile(self.path, metadata, tensors)

    def magic(self) -> None:
        start = self.need(4)
        if self.data[start : start + 4] != b"GGUF":
            raise self.problem("does not start with GGUF")
        version = self.number("<I")
        if version & 0xFFFF == 0:
            raise self.problem("is a big-endian GGUF file, which is not supported")
        if version not in {2, 3}:
            raise self.problem(f"is GGUF version {version}; versions 2 and 3 are supported")

    def table(self, count: int, entry: Callable[[], Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for _ in range(count):
            name = self.text()
            if name in result:
                raise self.problem(f"damaged: {name!r} appears twice")
            result[name] = entry()
        return result

    def refuse_split(self, metadata: Mapping[str, Any]) -> None:
        parts = metadata.get("split.count", 0)
        if parts > 1:
            hint = "join the parts with `llama-gguf-split --merge` first"
            raise SourceError(self.path, f"is one of {parts} parts of a split checkpoint", hint)

    def tensor_info(self) -> tuple[tuple[int, ...], int, int]:
        axes = self.number("<I")
        if axes > 4:
            raise self.problem(f"damaged: a tensor with {axes} axes at byte {self.at}")
        dims = tuple(self.number("<Q") for _ in range(axes))
        return dims[::-1], self.number("<I"), self.number("<Q")

    def tensor(self, name: str, info: tuple[tuple[int, ...], int, int], base: int) -> GgufTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        shape, number, offset = info
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            hint = "update the gguf package, or requantize the file"
            problem = f"tensor {name!r} has the unknown ggml type {number}"
            raise SourceError(self.path, problem, hint) from error
        block, block_bytes = GGML_QUANT_SIZES[kind]
        width = shape[-1] if shape else 1
        if width % block:
            raise self.problem(
                f"tensor {name!r}: rows of {width} are not a multiple of a {kind.name} block"
            )
        return GgufTensor(shape or (1,), kind.name, base + offset, width // block * block_bytes)

    def check_layout(self, tensors: Mapping[str, GgufTensor]) -> None:
        """Check that no tensor overlaps another and that the last one ends inside the file."""
        end, size = self.at, len(self.data)
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < end:
                raise self.problem(f"tensor {name!r} overlaps the one before it")
            end = tensor.offset + tensor.size_bytes
        if end > size:
            raise self.problem(f"truncated: the tensors need {end} bytes, the file has {size}")
