"""Recognize layer and RMS normalization, however they are spelled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Final

from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.rules import apply, layer_norm, rms_norm


@dataclass(frozen=True)
class FuseNorms(Pass):
    """Fuse layer and RMS normalization into one operator each.

    Rewrites: see ``rules/layer_norm.py`` and ``rules/rms_norm.py``.
    Numerics: within 1e-6 relative in float32.
    Scope: the graph. Leaves: means over other axes; a scale that is not one per channel stays
    beside the operator.
    """

    name: ClassVar[str] = "fuse-norms"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = apply(program, _RULES, "norm")
        norms = g.nodes(program.graph, "LayerNormalization", "RMSNormalization")
        fused = {reader.name for node in norms for reader in g.users(node.outputs[0])}
        # a scale that stayed beside its operator is worth a note, and is no norm that was missed
        outcome.missed = [replace(m, kind="") if m.node in fused else m for m in outcome.missed]
        return outcome


# the longest formula first: what is left of it is a shorter one
_RULES: Final = (
    layer_norm.RULE,
    layer_norm.UNBIASED,
    rms_norm.RULE,
    layer_norm.PLAIN,
    rms_norm.PLAIN,
)
