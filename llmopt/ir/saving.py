"""Writing a model with its weights in a file beside it, and making sure that they arrived."""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

from llmopt.errors import LlmoptError


def save_with_data(model: ir.Model, path: Path, data: str, *, alignment: int | None = None) -> None:
    """Write ``model`` to ``path`` and its weights to the file ``data`` beside it.

    Args:
        model: Model to write.
        path: Output file.
        data: The name of the file of weights.
        alignment: Large weights start at multiples of this many bytes.

    Raises:
        OSError: The disk is full, or another reason of the system's.
        LlmoptError: A weight cannot be what it is to become.
    """
    with readable():
        ir.save(model, path, format="protobuf", external_data=data, alignment=alignment)
    # numpy's tofile drops what a full disk did not take of its last buffer without a word.
    needed = max((end for end in _ends(path)), default=0)
    there = (path.parent / data).stat().st_size if needed else 0
    if there < needed:
        raise OSError(errno.ENOSPC, f"{there} of {needed} bytes of weights were written")


def save_all(
    models: Mapping[str, ir.Model], folder: Path, data: str, *, alignment: int | None = None
) -> None:
    """Write several models beside each other and their weights to one file, each weight once.

    Args:
        models: By the name of their file.
        folder: Output directory.
        data: The name of the file of weights.
        alignment: Large weights start at multiples of this many bytes.

    Raises:
        OSError: The disk is full, or another reason of the system's.
        LlmoptError: A weight cannot be what it is to become.
    """
    if len(models) == 1:
        ((name, model),) = models.items()
        save_with_data(model, folder / name, data, alignment=alignment)
        return
    placed: dict[bytes, int] = {}
    with (folder / data).open("wb") as whole:
        for name, model in models.items():
            own = folder / f"{name}.own"
            save_with_data(model, folder / name, own.name, alignment=alignment)
            proto = onnx.load(folder / name, load_external_data=False, format="protobuf")
            for tensor in proto.graph.initializer:
                if tensor.external_data:
                    _move(tensor, own, whole, placed, alignment or 1)
            (folder / name).write_bytes(proto.SerializeToString(deterministic=True))
            own.unlink(missing_ok=True)


def _move(
    tensor: onnx.TensorProto,
    own: Path,
    stream: BinaryIO,
    placed: dict[bytes, int],
    alignment: int,
) -> None:
    """Let a tensor's numbers be in the common file, where equal ones may be already."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    start, length = int(entries.get("offset", 0)), int(entries["length"])
    pieces = _mapped(own, start, length)
    digest = hashlib.sha256(pieces).digest()
    if digest not in placed:
        stream.write(bytes(-stream.tell() % alignment))
        placed[digest] = stream.tell()
        stream.write(pieces)
    del tensor.external_data[:]
    where = {"location": Path(stream.name).name, "offset": placed[digest], "length": length}
    for key, value in where.items():
        tensor.external_data.add(key=key, value=str(value))


def _mapped(file: Path, start: int, length: int) -> memoryview:
    """Return a part of a file, read when it is looked at."""
    return np.memmap(file, np.uint8, "r", start, (length,)).data


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Raise what a weight said when it was read, where that is one of our errors."""
    try:
        yield
    except ir.serde.SerdeError as error:
        raise _told(error) from error


def _told(error: BaseException) -> BaseException:
    """Return what a tensor said when it was read, if it is one of our errors."""
    cause = error.__cause__
    while cause is not None and not isinstance(cause, LlmoptError):
        cause = cause.__cause__
    return cause or error


def _ends(path: Path) -> list[int]:
    """Return where each tensor kept outside the model ends."""
    model = onnx.load(path, load_external_data=False, format="protobuf")
    outside = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
    ]
    return [int(each.get("offset", 0)) + int(each["length"]) for each in outside if each]
