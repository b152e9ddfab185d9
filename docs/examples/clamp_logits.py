"""Keep logits within bounds."""

from dataclasses import dataclass
from typing import ClassVar

from llmopt import Outcome, Pass, Program
from llmopt.ir import graph as g


@dataclass(frozen=True)
class ClampLogits(Pass):
    """Rewrite ``logits`` into ``Clip(logits, -limit, limit)``.

    Args:
        limit: The largest magnitude.
    """

    name: ClassVar[str] = "clamp-logits"
    limit: float = 30.0

    def run(self, program: Program) -> Outcome:
        outcome, logits = Outcome(), program.output("logits")
        if logits is None or g.producer(logits, "Clip") is not None:
            outcome.miss("logits", "no such output" if logits is None else "clamped already")
            return outcome
        build = g.Builder(program.graph)
        bounds = [build.constant(bound, "float32") for bound in (-self.limit, self.limit)]
        g.replace_output(logits, build.op("Clip", [logits, *bounds], name="clamp"))
        outcome.hit()
        return outcome
