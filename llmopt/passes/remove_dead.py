"""Remove nodes and initializers whose results nothing reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from llmopt.ir.graph import remove_dead
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass


@dataclass(frozen=True)
class RemoveDead(Pass):
    """Remove nodes and initializers whose results nothing reads.

    Numerics: exact. Scope: the graph. Leaves: inputs and outputs.
    """

    name: ClassVar[str] = "remove-dead"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        outcome.hit(int(remove_dead(program.model)))
        return outcome
