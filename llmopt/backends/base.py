"""What a backend is: it checks a Program, lowers it to files, and says where it can run."""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy.typing as npt

from llmopt.errors import UnknownNameError, UsageError
from llmopt.ir.program import Program
from llmopt.passes.base import Pass

Arrays = dict[str, npt.NDArray[Any]]
Run = Callable[[Mapping[str, npt.NDArray[Any]]], Arrays]
_TARGET: Final = re.compile(r"(?P<name>[A-Za-z0-9-]+)(?:\{(?P<options>[^{}]*)\})?\Z")


@dataclass(frozen=True)
class Availability:
    """Whether a target can build and run on this machine.

    Args:
        builds: What is missing to build; empty if nothing is.
        runs: What is missing to run; empty if nothing is.
    """

    builds: str = ""
    runs: str = ""


@dataclass(frozen=True)
class Lowered:
    """What a backend wrote.

    Args:
        entry: The file in the folder to open first.
        program: The Program as it was lowered.
        versions: Of what it was made with.
    """

    entry: str
    program: Program
    versions: Mapping[str, str | int]


class Backend(abc.ABC):
    """A place to lower a Program to. Subclasses are frozen dataclasses of options.

    Attributes:
        name: The target's name, without options.
        summary: One line for ``llmopt targets``.
        schemes: The quantization schemes it has kernels for.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    schemes: ClassVar[frozenset[str]]

    @abc.abstractmethod
    def available(self) -> Availability:
        """Say what is missing on this machine, if anything."""

    @abc.abstractmethod
    def check(self, program: Program) -> list[str]:
        """Return every operator that this backend cannot lower; nothing is done yet."""

    @abc.abstractmethod
    def passes(self, scheme: str | None) -> tuple[Pass, ...]:
        """Return the lowering passes, in order."""

    @abc.abstractmethod
    def write(self, program: Program, folder: Path) -> Lowered:
        """Write a lowered Program into ``folder``."""

    @abc.abstractmethod
    def open(self, entry: Path, *, exact: bool = False) -> Run:
        """Return a function from inputs to outputs of what was written, on this machine.

        Args:
            entry: The file to open.
            exact: Compute in float32 what a kernel would round, where there is a choice.

        Raises:
            BackendUnavailableError: the library or the device is not here.
        """


def split_target(text: str) -> tuple[str, dict[str, str]]:
    """Return the name and options of ``name{option=value,...}``.

    >>> split_target("tvm-cpu{mcpu=znver4}")
    ('tvm-cpu', {'mcpu': 'znver4'})

    Raises:
        UsageError: the text is not of that form.
    """
    match = _TARGET.match(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a target: write name or name{{option=value,...}}")
    options = {}
    for pair in filter(None, (match["options"] or "").split(",")):
        key, sign, value = pair.partition("=")
        if not sign:
            raise UsageError(f"target option {pair!r}: write option=value")
        options[key.strip()] = value.strip()
    return match["name"], options


def refuse_options(name: str, options: Mapping[str, str]) -> None:
    """Raise if a target that has no options was given some.

    Raises:
        UnknownNameError: naming the first.
    """
    for key in options:
        raise UnknownNameError(f"option of target {name}", key, ())
