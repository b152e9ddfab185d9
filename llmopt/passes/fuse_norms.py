"""Recognize layer and RMS normalization, however they are spelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.rules import apply, layer_norm, rms_norm


@dataclass(frozen=True)
class FuseNorms(Pass):
    """Fuse layer and RMS normalization into one operator each.

    Rewrites: see ``rules/layer_norm.py`` and ``rules/rms_norm.py``.
    Numerics: within 1e-6 relative in float32.
    Scope: the graph. Leaves: means over other axes, scales that are not one per channel.
    """

    name: ClassVar[str] = "fuse-norms"

    @override
    def run(self, program: Program) -> Outcome:
        return apply(program, (layer_norm.RULE, rms_norm.RULE), "norm")
