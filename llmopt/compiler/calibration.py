"""What quantization has to know of the source's activations, measured before it begins."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from llmopt.frontend.base import Source
from llmopt.interface.facts import ModelFacts
from llmopt.ir.components import edge, source_feeds
from llmopt.ir.feeds import Case, feeds
from llmopt.ir.images import illustrated

CASE: Final = Case(1, 128, 0, "none", seed=1)


def measure_activations(source: Source) -> None:
    """Let the Program know how large what meets each column of each weight is.

    Measured on 128 random tokens, the same always: with 64 or 512, or with real text, the KL of
    SmolLM2 in 4 bits is the same to 2 %. An image comes on top, where there may be one. Once: what
    is known is not measured again.
    """
    from llmopt.frontend.activations import mean_squares

    program = source.program
    if program.facts.activations:
        return
    facts = program.facts.model
    length = CASE.new + facts.image_length
    case = replace(CASE, new=min(facts.max_length or length, length))
    batch = feeds(edge(program), case, facts.vocabulary or 2)
    batch |= source_feeds(program, replace(case, new=_source_length(facts)))
    batch = illustrated(program, batch, case.mask())
    program.learn(activations=mean_squares(source.reference, [batch]))


def _source_length(facts: ModelFacts) -> int:
    return min(facts.max_source or CASE.new, CASE.new)
