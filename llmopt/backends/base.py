"""What a backend is: it checks a Program, lowers it to files, and says where it can run."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from llmopt import spelling
from llmopt.interface.arrays import Run
from llmopt.ir.program import Program
from llmopt.passes.base import Pass
from llmopt.quantization.schemes import Blockwise, Scheme

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


@dataclass(frozen=True)
class Availability:
    """Whether a target can build and run on this machine.

    Args:
        builds: The package or device that is missing to build; empty if nothing is.
        runs: The package or device that is missing to run; empty if nothing is.
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
        versions: Versions of the libraries that made it.
        requires: Needs of the machine that runs it, and the bounds it was built for:
            ``{"cpu_features": ["avx2"], "batch": 8}``. A runner refuses what does not fit.
        notes: Sentences for the user.
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

    Every option has a default, is of a type that text can spell, and is written
    ``name{option=value,...}``.

    Attributes:
        name: The target's name, without options.
        summary: One line for ``llmopt targets``.
        schemes: Names of the quantization schemes it has kernels for; ``supports`` may refuse some
            of their options.
        islands: What ``convert-float`` keeps in float32 for it; with ``"activations"``,
            ``narrow-weights`` runs instead, and weights of products alone are of 16 bits.
        takes_components: Whether it writes models of several components, an encoder and a decoder.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    schemes: ClassVar[frozenset[str]]
    islands: ClassVar[str] = "sums"
    takes_components: ClassVar[bool] = False

    @property
    def target(self) -> str:
        """The target as text, with the options that were set."""
        return spelling.spell(self)

    @property
    def default_scheme(self) -> Scheme | None:
        """The scheme where none is requested; None keeps float32."""
        return None

    def supports(self, scheme: Scheme) -> str | None:
        """Return why a scheme has no kernels here and what to write instead, None if it has."""
        if scheme.name not in self.schemes:
            return f"no kernels for {scheme.name}, only for {', '.join(sorted(self.schemes))}"
        head = scheme.of(head=True).name if isinstance(scheme, Blockwise) else scheme.name
        if head not in self.schemes:
            instead = "head=8" if "w8" in self.schemes else f"{scheme.name} without head"
            return f"no codes of {head[1:]} bits for the head; write {instead}"
        return None

    def resolved(
        self,
        program: Program,  # noqa: ARG002 - most have no open option
        scheme: Scheme | None,  # noqa: ARG002 - as above
    ) -> tuple[Self, tuple[str, ...]]:
        """Return this backend with its open options chosen for ``program``, and notes on why.

        Raises:
            BackendUnavailableError: what an option asks for is not here.
        """
        return self, ()

    def storage_scheme(self, scheme: Scheme) -> Scheme:
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

    def partially_lowered(self, program: Program) -> Program | None:  # noqa: ARG002 - most run nothing so
        """Return what computes the same as ``program``, which only some passes have lowered.

        It can be written and opened. None if only what is lowered whole can be. ``program`` is
        edited.
        """
        return None

    def proxy_backend(self) -> Backend | None:
        """Return what is written and run in this one's place to verify, if it cannot run here.

        Its operators are the same, so that the same lowered Program is written for it.
        """
        return None

    @property
    def proven_by(self) -> str:
        """What runs the artifact while it is verified, where that is not the target itself."""
        return ""

    def tolerance(self, scheme: Scheme | None) -> float:  # noqa: ARG002 - most have one for all
        """Return the relative error that verification allows."""
        return TOLERANCE

    def example_bounds(self, scheme: Scheme | None) -> ExampleBounds | None:
        """Return how far a device may be from an artifact's example; None for no example."""
        if scheme is None:
            return ExampleBounds(self.tolerance(None))
        few = isinstance(scheme, Blockwise) and scheme.bits == 4
        rounded = ROUNDED_TOGETHER if few else ROUNDED
        return ExampleBounds(max(self.tolerance(scheme), rounded), COUNTED)

    @abc.abstractmethod
    def available(self) -> Availability:
        """Say what is missing on this machine, if anything."""

    @abc.abstractmethod
    def check(self, program: Program) -> list[str]:
        """Return every operator that this backend cannot lower; nothing is done yet."""

    @abc.abstractmethod
    def passes(self, scheme: Scheme | None) -> tuple[Pass, ...]:
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
