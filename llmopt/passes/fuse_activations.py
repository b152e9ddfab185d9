"""Recognize GELU and SiLU, however they are spelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.rules import apply, gelu, swish


@dataclass(frozen=True)
class FuseActivations(Pass):
    """Fuse GELU (exact and by tanh) and SiLU into one operator each.

    Rewrites: see ``rules/gelu.py`` and ``rules/swish.py``. A SwiGLU is then
    ``Mul(Swish(gate), up)``, the one spelling of the dialect.
    Numerics: within 1e-6 relative in float32.
    Scope: the graph. Leaves: constants that are not those of the formula.
    """

    name: ClassVar[str] = "fuse-activations"

    @override
    def run(self, program: Program) -> Outcome:
        return apply(program, (gelu.EXACT, gelu.BY_TANH, swish.RULE), "activation")
