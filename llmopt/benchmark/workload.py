"""What is measured, as text: ``prefill=128,decode=64``, ``encode=8x128`` or a file of inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from typing_extensions import override

from llmopt.errors import UsageError

_FORMS: Final = "'prefill=128,decode=64', 'encode=8x128' (rows x tokens) and FILE.npz (inputs)"


@dataclass(frozen=True)
class Generate:
    """Continue prompts of random tokens.

    Args:
        prefill: Tokens of each prompt.
        decode: Tokens generated after it.
        batch: How many prompts at once.

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
    """Encode rows of random tokens in one batch.

    Args:
        batch: Rows.
        length: Tokens a row.

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
        path: A ``.npz`` file, one array for each input.

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
        text: See the top of this module.
        batch: Replaces the batch of the text, where given.

    Raises:
        UsageError: It has none of the forms, or a number is 0.

    >>> parse_workload("encode=8x128", batch=2)
    Encode(batch=2, length=128)
    """
    if text.endswith(".npz"):
        if batch is not None:
            raise UsageError(f"--batch {batch}: how many rows there are, {text} says")
        return Inputs(text)
    parts = text.replace(" ", "").lower()
    generate = re.fullmatch(r"prefill=(\d+),decode=(\d+)(?:,batch=(\d+))?", parts)
    encode = re.fullmatch(r"encode=(\d+)x(\d+)", parts)
    found: Generate | Encode
    if generate:
        found = Generate(int(generate[1]), int(generate[2]), int(generate[3] or 1))
    elif encode:
        found = Encode(int(encode[1]), int(encode[2]))
    else:
        raise UsageError(f"workload {text!r} is none; the forms are {_FORMS}")
    if batch is not None:
        found = replace(found, batch=batch)
    return _checked(found)


def default_workload(task: str, max_length: int, batch: int | None = None) -> Workload:
    """Return what `llmopt bench` measures when nothing is asked for, within ``max_length``.

    Raises:
        UsageError: Nobody knows what such a model takes.

    >>> default_workload("generate", 2048), default_workload("embed", 64)
    (Generate(prefill=128, decode=64, batch=1), Encode(batch=8, length=64))
    """
    limit = max_length or 2**31
    if task in {"raw", "text-to-text", "speech-to-text"}:
        raise UsageError("this model has inputs of its own: give them with --workload FILE.npz")
    if task == "generate":
        decode = min(64, max(1, limit // 3))
        return Generate(min(128, limit - decode), decode, batch or 1)
    return Encode(batch or 8, min(128, limit))


def _checked(workload: Generate | Encode) -> Workload:
    for name, number in vars(workload).items():
        if number < 1:
            raise UsageError(f"workload {workload}: {name} is below 1")
    return workload
