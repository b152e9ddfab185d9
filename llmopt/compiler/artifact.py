"""The options of the compiler, and the artifact that it writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from llmopt.artifact.manifest import Manifest
    from llmopt.fusion import FusionCount
    from llmopt.passes.pipeline import Item, Ran
    from llmopt.passes.plugins import Plugin
    from llmopt.quantization.schemes import Scheme
    from llmopt.verification.checks import Checked

Progress = Callable[[str], None]
VERIFY: Final = ("each", "final", "off")
"""How much is compared: the Program after each pass and the artifact, the artifact, or nothing."""


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """What to make of a source.

    Args:
        quantize: The scheme of weights and activations; None keeps float32.
        passes: Items of the pipeline before quantization and lowering, see ``items_of``.
        plugins: Python files, modules or classes that define more passes.
        require: ``"attention=all"`` and the like: a miss is then an error.
        verify: Extent of the comparisons, one of ``VERIFY``.
        max_kl: The largest mean KL divergence from the source that is accepted, nats.
        force: Whether an existing output is replaced.
        batch: Most sequences at once, for backends that must know.
        defer_engine: Whether what needs the device is built there, at the first load.
        without: Lowering passes that are left out.
    """

    quantize: Scheme | None = None
    passes: tuple[Item, ...] = ("default",)
    plugins: Sequence[Plugin] = ()
    require: Sequence[str] = ()
    verify: str = "final"
    max_kl: float | None = None
    force: bool = False
    batch: int = 8
    defer_engine: bool = False
    without: frozenset[str] = frozenset()

    def minus(self, name: str) -> CompileOptions:
        """Return the same options, a pass taken away from their pipeline."""
        return dataclasses.replace(self, passes=(*self.passes, f"-{name}"))


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A compiled model on disk.

    Args:
        path: The directory.
        manifest: The manifest in it.
        passes: The result of each pass.
        fusion: The fusions that were expected, and those that were made, by kind.
        notes: Sentences that a user should read.
        checks: The error after each pass, where it was measured: first that of the traced Program
            against its source, then one for each of ``passes``.
    """

    path: Path
    manifest: Manifest
    passes: tuple[Ran, ...] = ()
    fusion: Mapping[str, FusionCount] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    checks: tuple[Checked, ...] = ()

    @property
    def size_bytes(self) -> int:
        """All of its files together."""
        return sum(file.size_bytes for file in self.manifest.files)

    def summary(self) -> dict[str, Any]:
        """Return what ``compile --json`` shows of it."""
        checks = [{"verification": check.summary()} for check in self.checks]
        traced = {"traced": checks[0]["verification"]} if checks else {}
        checked = checks[1:] or [{}] * len(self.passes)
        return {
            "path": str(self.path),
            "target": self.manifest.target,
            "size_bytes": self.size_bytes,
            "passes": [
                {
                    "name": ran.name,
                    "applied": ran.applied,
                    "missed": [{"node": m.node, "reason": m.reason} for m in ran.missed],
                }
                | ({"notes": list(ran.notes)} if ran.notes else {})
                | check
                for ran, check in zip(self.passes, checked, strict=True)
            ],
            "fusion": {kind: dataclasses.asdict(fused) for kind, fused in self.fusion.items()},
            "verification": dict(self.manifest.verification),
            "quality": dict(self.manifest.quality),
        } | traced
