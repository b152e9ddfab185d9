"""Writing a model with its weights in a file beside it, and making sure that they arrived."""

from __future__ import annotations

import errno
from pathlib import Path

import onnx
import onnx_ir as ir

from llmopt.errors import LlmoptError


def save_with_data(model: ir.Model, path: Path, data: str, *, alignment: int | None = None) -> None:
    """Write ``model`` to ``path`` and its weights to the file ``data`` beside it.

    Args:
        model: What to write.
        path: Where to.
        data: The name of the file of weights.
        alignment: Large weights start at multiples of this many bytes.

    Raises:
        OSError: The disk is full, or another reason of the system's.
        LlmoptError: A weight cannot be what it is to become.
    """
    try:
        ir.save(model, path, format="protobuf", external_data=data, alignment=alignment)
    except ir.serde.SerdeError as error:
        raise _told(error) from error
    # numpy's tofile drops what a full disk did not take of its last buffer without a word.
    needed = max((end for end in _ends(path)), default=0)
    there = (path.parent / data).stat().st_size if needed else 0
    if there < needed:
        raise OSError(errno.ENOSPC, f"{there} of {needed} bytes of weights were written")


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
