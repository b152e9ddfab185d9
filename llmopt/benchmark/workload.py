"""Workloads as text: ``prefill=128,decode=64``, ``encode=8x128`` or a file of inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from typing_extensions import override

from llmopt.errors import UsageError

_FORMS: Final = "'prefill=128,decode=64', 'encode=8x128' (batch x tokens) or FILE.npz (inputs)"


@dataclass(frozen=True)
class Generate:
    """Continue prompts of random tokens.

    Args:
        prefill: Tokens of each prompt.
        decode: Tokens generated after it.
        batch: Prompts in a batch.

    >>> str(Generate(128, 64, batch=2))
    'prefill=128,decode=64,batch=2'
    """

    prefill: int
    decode: int
    batch: int = 1

    @override
    def __str__(self) -> str:
        batch = f",batch={self.batch}" if self.batch > 1 else ""
        return f"prefill={self.prefill},decode={self.decode}{batch}"


@dataclass(frozen=True)
class Encode:
    """Encode one batch of random tokens.

    Args:
        batch: Sequences in the batch.
        length: Tokens per sequence.

    >>> str(Encode(8, 128))
    'encode=8x128'
    """

    batch: int
    length: int

    @override
    def __str__(self) -> str:
        return f"encode={self.batch}x{self.length}"


@dataclass(frozen=True)
class Inputs:
    """Run the model once on arrays.

    Args:
        path: A ``.npz`` file with one array per input.

    >>> str(Inputs("images.npz"))
    'images.npz'
    """

    path: str

    @override
    def __str__(self) -> str:
        return self.path


Workload = Generate | Encode | Inputs


def parse_workload(text: str, batch: int | None = None) -> Workload:
    """Return the workload that ``text`` describes.

    Args:
        text: A workload, as the module describes.
        batch: Batch size that overrides the text's.

    Raises:
        UsageError: The text has an unknown form, or a number is 0.

    >>> parse_workload("encode=8x128", batch=2)
    Encode(batch=2, length=128)
    """
    if text.endswith(".npz"):
        if batch is not None:
            raise UsageError(
                f"--batch {batch} conflicts with {text}, whose arrays already set the batch size"
            )
        return Inputs(text)
    parts = text.replace(" ", "").lower()
    generate = re.fullmatch(r"prefill=(\d+),decode=(\d+)(?:,batch=(\d+))?", parts)
    encode = re.fullmatch(r"encode=(\d+)x(\d+)", parts)
    workload: Generate | Encode
    if generate:
        workload = Generate(int(generate[1]), int(generate[2]), int(generate[3] or 1))
    elif encode:
        workload = Encode(int(encode[1]), int(encode[2]))
    else:
        raise UsageError(f"unknown workload {text!r}; use {_FORMS}")
    if batch is not None:
        workload = replace(workload, batch=batch)
    return _checked(workload)


def default_workload(task: str, max_length: int, batch: int | None = None) -> Workload:
    """Return the default workload of `llmopt bench` for a task, within ``max_length``.

    Raises:
        UsageError: The task has no default workload.

    >>> default_workload("generate", 2048), default_workload("embed", 64)
    (Generate(prefill=128, decode=64, batch=1), Encode(batch=8, length=64))
    """
    limit = max_length or 2**31
    if task in {"raw", "text-to-text", "speech-to-text"}:
        raise UsageError(
            f"task {task!r} has no default workload; give inputs with --workload FILE.npz"
        )
    if task == "generate":
        decode = min(64, max(1, limit // 3))
        return Generate(min(128, limit - decode), decode, batch or 1)
    return Encode(batch or 8, min(128, limit))


def _checked(workload: Generate | Encode) -> Workload:
    for name, number in vars(workload).items():
        if number < 1:
            raise UsageError(f"workload {workload}: {name} must be at least 1")
    return workload
