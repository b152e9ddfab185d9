"""What a source is: how it is read, what reading it gives, and where its tensors come from."""

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
    """How a source shall be read.

    Args:
        model: ``file.py:factory`` of the module that a state_dict belongs to.
        trust_pickle: Whether a file may execute code that it carries.
        task: ``"generate"``, ``"embed"``, ``"encode"`` or ``"raw"``; recognized if not given.
        example_inputs: Arrays or tensors by name or in order, or the path of an .npz.
        dynamic_shapes: Dimensions as ``torch.export.export`` takes them; batch and tokens if
            not given.
        max_length: The most tokens of one sequence; the model's own limit if not given.
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
        name: The name that the artifact gets.
        program: The Program, as traced.
        reference: The source itself, to compare with.
        notes: Sentences for the user: files that are missing, a chat template left out.
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
        """Return a fresh array; nothing of the file stays in memory beside it.

        Raises:
            SourceError: The file changed or cannot be read.
        """

    def read_float32(self, name: str) -> np.ndarray:
        """Return the same as float32.

        Raises:
            SourceError: The file changed or cannot be read.
        """


def unreadable(file: Path, error: OSError) -> LlmoptError:
    """Return the error to raise when the system refuses to read ``file``."""
    return SourceError(file, f"cannot be read ({error.strerror})", "check the file and its rights")
