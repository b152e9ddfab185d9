"""What quantization has to know of the source's activations, measured before it begins."""

from __future__ import annotations

from typing import Final

from llmopt.frontend.source import Source
from llmopt.ir.feeds import Case, feeds

TOKENS: Final = 256
SEEDS: Final = (1, 2)


def measure_activations(source: Source) -> None:
    """Let the Program know how large what meets each column of each weight is.

    Measured on random tokens, the same always. Once: what is known is not measured again.
    """
    from llmopt.frontend.activations import mean_squares

    program = source.program
    if program.facts.activations:
        return
    length = min(program.facts.max_length or TOKENS, TOKENS)
    vocabulary = program.facts.model.vocabulary or 2
    cases = [Case(1, length, 0, "none", seed) for seed in SEEDS]
    batches = [feeds(program.signature, case, vocabulary) for case in cases]
    program.learn(activations=mean_squares(source.reference, batches))
