"""What quantization has to know of the source's activations, measured before it begins."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from llmopt.bundle.manifest import ModelFacts
from llmopt.frontend.source import Source
from llmopt.ir.chained import source_feeds
from llmopt.ir.feeds import Case, feeds

CASE: Final = Case(1, 128, 0, "none", seed=1)


def measure_activations(source: Source) -> None:
    """Let the Program know how large what meets each column of each weight is.

    Measured on 128 random tokens, the same always: with 64 or 512, or with real text, the KL of
    SmolLM2 in 4 bits is the same to 2 %. Once: what is known is not measured again.
    """
    from llmopt.frontend.activations import mean_squares

    program = source.program
    if program.facts.activations:
        return
    case = replace(CASE, new=min(program.facts.max_length or CASE.new, CASE.new))
    batch = feeds(program.signature, case, program.facts.model.vocabulary or 2)
    batch |= source_feeds(program, replace(case, new=_source_length(program.facts.model)))
    program.learn(activations=mean_squares(source.reference, [batch]))


def _source_length(facts: ModelFacts) -> int:
    return min(facts.max_source or CASE.new, CASE.new)
