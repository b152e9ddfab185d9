"""What a backend is: it checks a Program, lowers it to files, and says where it can run."""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from llmopt.errors import UnknownNameError, UsageError
from llmopt.interface.arrays import Run
from llmopt.ir.program import Program
from llmopt.passes.base import Pass
from llmopt.quantization.schemes import Scheme

TOLERANCE: Final = 1e-3
"""Sums of thousands of float32 products in another order; rounded weights are compared with the
source's own, rounded the same way, and multiplied in float32."""
ROUNDED: Final = 5e-2
"""Of outputs whose activations kernels round to int8, as each processor's kernels group them."""
ROUNDED_TOGETHER: Final = 1e-1
"""Of outputs of weights of 4 bits: KleidiAI's kernels for arm64 and those for tiles of AMX scale
many more activations together than a block has, and large ones cost the small ones two bits."""
COUNTED: Final = 0.95
"""Part of the tokens that has to keep it: in a trained model a small change can move a token onto
or off an attention sink (Xiao et al. 2024, arXiv:2309.17453), and its logits are others then."""
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
class ExampleBounds:
    """How far outputs on a device may be from the example that an artifact carries.

    Args:
        tolerance: ``max|a - b| / max|b|``.
        counted: Part of a decoder's tokens that has to keep it.
    """

    tolerance: float
    counted: float = 1.0


@dataclass(frozen=True)
class Demand:
    """What an artifact has to serve, where a backend must know before it builds.

    Args:
        batch: Most sequences at once.
        defer_engine: Whether the part that needs the device is built there, at the first load.
    """

    batch: int = 8
    defer_engine: bool = False


@dataclass(frozen=True)
class Lowered:
    """What a backend wrote.

    Args:
        entry: The file in the folder to open first.
        program: The Program as it was lowered.
        versions: Of what it was made with.
        requires: What the machine that runs it must have, and the bounds it was built for:
            ``{"cpu_features": ["avx2"], "batch": 8}``. A runner refuses what does not fit.
        notes: What a user should know.
        others: The files of further components, by name.
    """

    entry: str
    program: Program
    versions: Mapping[str, str | int]
    requires: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict)

    def within(self, folder: Path) -> dict[str, Path]:
        """Return the file of each component, the main one last."""
        files = {**self.others, self.program.main: self.entry}
        return {name: folder / file for name, file in files.items()}


class Backend(abc.ABC):
    """A place to lower a Program to. Subclasses are frozen dataclasses of options.

    Every option is text, has a default, and is written ``name{option=value,...}``.

    Attributes:
        name: The target's name, without options.
        summary: One line for ``llmopt targets``.
        schemes: The quantization schemes it has kernels for.
        islands: What ``convert-float`` keeps in float32 for it; with ``"activations"``,
            ``narrow-weights`` runs instead, and weights of products alone are of 16 bits.
        takes_components: Whether it writes models of several components, an encoder and a decoder.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    schemes: ClassVar[frozenset[str]]
    islands: ClassVar[str] = "sums"
    takes_components: ClassVar[bool] = False

    @classmethod
    def configured(cls, options: Mapping[str, str]) -> Self:
        """Return the backend with these options.

        Raises:
            UnknownNameError: it has no such option.
        """
        known = [field.name for field in _options(cls)]
        for key in options:
            if key not in known:
                raise UnknownNameError(f"option of target {cls.name}", key, known)
        return cls(**options)

    @property
    def target(self) -> str:
        """The target as text, with the options that were set."""
        given = [(option, getattr(self, option.name)) for option in _options(type(self))]
        changed = [f"{o.name}={value}" for o, value in given if value != o.default]
        return self.name + (f"{{{','.join(changed)}}}" if changed else "")

    @property
    def default_scheme(self) -> str | None:
        """The scheme where none is asked for; None keeps float32."""
        return None

    def settled(
        self,
        program: Program,  # noqa: ARG002 - most have nothing to settle
        scheme: str | None,  # noqa: ARG002 - as above
    ) -> tuple[Self, tuple[str, ...]]:
        """Return this backend with its open options chosen for ``program``, and notes on why.

        Raises:
            BackendUnavailableError: what an option asks for is not here.
        """
        return self, ()

    def stored(self, scheme: Scheme) -> Scheme:
        """Return the scheme as this backend stores it.

        Raises:
            UsageError: it cannot.
        """
        return scheme

    def cache_obstacle(
        self,
        program: Program,  # noqa: ARG002 - most run any cache
    ) -> str | None:
        """Return why the caches that were added to ``program`` do not run here, None if they do."""
        return None

    def in_part(self, program: Program) -> Program | None:  # noqa: ARG002 - most run nothing so
        """Return what computes the same as ``program``, which only some passes have lowered.

        It can be written and opened. None if only what is lowered whole can be. ``program`` is
        edited.
        """
        return None

    def stand_in(self) -> Backend | None:
        """Return what is written and run in this one's place to verify, if it cannot run here.

        Its operators are the same, so that the same lowered Program is written for it.
        """
        return None

    @property
    def proven_by(self) -> str:
        """What runs the artifact while it is verified, where that is not the target itself."""
        return ""

    def tolerance(self, scheme: str | None) -> float:  # noqa: ARG002 - most have one for all
        """Return the relative error that verification allows."""
        return TOLERANCE

    def example_bounds(self, scheme: str | None) -> ExampleBounds | None:
        """Return how far a device may be from an artifact's example; None for no example."""
        if scheme is None:
            return ExampleBounds(self.tolerance(None))
        rounded = ROUNDED_TOGETHER if scheme.startswith("w4") else ROUNDED
        return ExampleBounds(max(self.tolerance(scheme), rounded), COUNTED)

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
    def write(self, program: Program, folder: Path, demand: Demand) -> Lowered:
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


def _options(backend: type[Any]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(backend) if dataclasses.is_dataclass(backend) else ()
