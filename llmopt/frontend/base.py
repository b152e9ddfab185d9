"""Sources: the options to read one with, what reading returns, and the protocol of checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from llmopt.errors import LlmoptError, SourceError
from llmopt.ir.program import Program

if TYPE_CHECKING:
    from llmopt.frontend.reference import Reference

KINDS: Final = "give a Hugging Face folder, .gguf, .onnx, .pt2, .pt, or module.py:factory"


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Options for reading a source.

    Args:
        model: ``file.py:factory`` of the module that a state_dict belongs to.
        trust_pickle: Whether a file may execute code that it carries.
        task: ``"generate"``, ``"embed"``, ``"encode"`` or ``"raw"``; inferred by default.
        example_inputs: Arrays or tensors by name or in order, or the path of an .npz file.
        dynamic_shapes: Argument of ``torch.export.export``; batch and tokens by default.
        max_length: Longest sequence, in tokens; the model's own limit by default.
        trust_remote_code: Whether Python code in a Hugging Face folder may be executed.
    """

    model: str | None = None
    trust_pickle: bool = False
    task: str | None = None
    example_inputs: Mapping[str, Any] | Sequence[Any] | str | Path | None = None
    dynamic_shapes: Any = None
    max_length: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Source:
    """A source that was read.

    Args:
        name: Default name of the artifact.
        program: Program of the source, as traced.
        reference: The source itself, to compare artifacts with.
        notes: Remarks for the user: missing files, a chat template left out.
    """

    name: str
    program: Program
    reference: Reference
    notes: tuple[str, ...] = ()


class Checkpoint(Protocol):
    """A source of named tensors.

    Attributes:
        path: The file or folder that was opened.
    """

    path: Path

    def names(self) -> Collection[str]:
        """Return the name of every tensor, as Hugging Face checkpoints spell it."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that `read` gives."""

    def dtype(self, name: str) -> str:
        """Return the element type as stored: ``"float32"``, ``"bfloat16"``, ``"Q4_1"``."""

    def read(self, name: str) -> np.ndarray:
        """Return a fresh array; no page of the file stays resident.

        Raises:
            SourceError: The file changed or cannot be read.
        """

    def read_float32(self, name: str) -> np.ndarray:
        """Return the tensor as a fresh float32 array.

        Raises:
            SourceError: The file changed or cannot be read.
        """


def unreadable(file: Path, error: OSError) -> LlmoptError:
    """Return the error to raise when the system refuses to read ``file``."""
    return SourceError(file, f"cannot be read ({error.strerror})", "check the file's permissions")
