"""GGUF checkpoints: ggml's quantized blocks decoded row by row, under Hugging Face names."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmopt.errors import SourceError
from llmopt.frontend.base import unreadable
from llmopt.frontend.gguf.file import GgufFile, GgufTensor, read_gguf
from llmopt.frontend.gguf.names import TensorLayout, huggingface_names

_PLAIN: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
}
_CHUNK = 1 << 19  # elements decoded at once: the decoders' temporaries stay near 10 MB


class GgufCheckpoint:
    """The tensors of a GGUF file, renamed and laid out as Hugging Face's.

    Args:
        path: The file.

    Raises:
        SourceError: The file is truncated or damaged.
        UnsupportedModelError: The architecture, or a tensor, is unknown.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: GgufFile = read_gguf(path)
        self._stored: dict[str, TensorLayout] = huggingface_names(self.file)

    def names(self) -> Collection[str]:
        """Return the Hugging Face name of every tensor."""
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that `read` gives."""
        stored = self._stored[name]
        shape = self.file.tensors[stored.source].shape
        return shape[::-1] if stored.layout == "transpose" else shape

    def dtype(self, name: str) -> str:
        """Return numpy's name of a plain type, or ggml's name of a quantized type."""
        kind = self.file.tensors[self._stored[name].source].kind
        return _PLAIN[kind].name if kind in _PLAIN else kind

    def read_float32(self, name: str) -> np.ndarray:
        """Return what `read` gives, as float32."""
        return self.read(name).astype(np.float32, copy=False)

    def read(self, name: str) -> np.ndarray:
        """Return a fresh array: plain types as stored, quantized ones as float32.

        Raises:
            SourceError: The file was changed since it was opened, or the gguf package
                cannot decode the type.
        """
        stored = self._stored[name]
        tensor = self.file.tensors[stored.source]
        out = np.empty(self.shape(name), _PLAIN.get(tensor.kind, np.dtype(np.float32)))
        rows = out.T if stored.layout == "transpose" else out.reshape(_row_shape(tensor))
        order = self._row_order(stored, tensor)
        for start, block in decoded_rows(self.path, tensor):
            rows[order[start : start + len(block)]] = block
        if stored.layout == "minus-one":
            out -= np.ones((), out.dtype)
        return out

    def _row_order(self, stored: TensorLayout, tensor: GgufTensor) -> np.ndarray:
        """Return the destination of each stored row."""
        rows, _ = _row_shape(tensor)
        if not stored.layout.startswith("unpermute"):
            return np.arange(rows)
        heads = self.file.number("attention.head_count")
        if stored.layout == "unpermute-k":
            heads = self.file.number("attention.head_count_kv", heads)
        if heads <= 0 or rows % (2 * heads):
            problem = f"{stored.source} has {rows} rows, not {heads} heads of even width"
            raise SourceError(self.path, problem, "convert it again")
        # ggml stores row (i, half) of a head where Hugging Face has (half, i)
        return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(rows)


def read_tensor(file: GgufFile, source: str) -> np.ndarray:
    """Return a tensor by its ggml name, decoded and otherwise as stored."""
    tensor = file.tensors[source]
    blocks = [block for _, block in decoded_rows(file.path, tensor)]
    return np.concatenate(blocks).reshape(tensor.shape)


def _row_shape(tensor: GgufTensor) -> tuple[int, int]:
    """Return [rows, width]; a vector counts as a column, so that its layout is by element."""
    if len(tensor.shape) == 1 and tensor.kind in _PLAIN:
        return tensor.shape[0], 1
    return tensor.rows, tensor.shape[-1]


def decoded_rows(path: Path, tensor: GgufTensor) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, rows [n, width]) in pieces of bounded size.

    Raises:
        SourceError: The file ends early or cannot be read.
    """
    rows, width = _row_shape(tensor)
    row_bytes = tensor.size_bytes // max(rows, 1)
    step = max(1, _CHUNK // max(width, 1))
    try:
        with path.open("rb") as stream:
            stream.seek(tensor.offset)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                raw = stream.read(count * row_bytes)
                if len(raw) != count * row_bytes:
                    hint = "it changed while it was read; compile again"
                    raise SourceError(path, f"ends at row {start} of a tensor", hint)
                yield start, _decode(path, tensor.kind, raw, (count, width))
    except OSError as error:
        raise unreadable(path, error) from error


def _decode(path: Path, kind: str, raw: bytes, shape: tuple[int, int]) -> np.ndarray:
    if kind in _PLAIN:
        return np.frombuffer(raw, _PLAIN[kind]).reshape(shape)
    from gguf import GGMLQuantizationType, quants

    data = np.frombuffer(raw, np.uint8).reshape(shape[0], -1)
    try:
        return np.asarray(quants.dequantize(data, GGMLQuantizationType[kind]))
    except NotImplementedError as error:
        hint = "requantize the file to a type such as Q8_0 or Q4_K"
        raise SourceError(path, f"the gguf package cannot decode type {kind}", hint) from error
