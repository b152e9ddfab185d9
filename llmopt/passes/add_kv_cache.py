"""Give a decoder that has no cache one of keys and values.

Rewrites::

    logits(input_ids [B, S])
    into    logits, present(input_ids [B, S], past)   S new tokens behind P past ones

What depends on tokens is computed for new ones alone; what depends on positions alone (masks,
rotary tables, learned positions, ALiBi) for all T = P + S, of which new tokens meet the last S
rows; keys and values of attention are put behind those of the past.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from typing_extensions import override

from llmopt.errors import NotIncrementalError
from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir.landmarks import Landmark, is_landmark
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.incremental.caches import add_caches
from llmopt.passes.incremental.checking import check_steps
from llmopt.passes.incremental.flow import BATCH, TOKENS, Flow
from llmopt.passes.incremental.padding import add_padding, can_be_padded
from llmopt.passes.incremental.proofs import Proofs
from llmopt.passes.incremental.reading import DecoderReading
from llmopt.passes.incremental.rules import carry
from llmopt.passes.incremental.signature import (
    check_edge,
    check_logits,
    cut_logits,
    learn,
    sign,
)


@dataclass(frozen=True)
class AddKvCache(Pass):
    """Give a causal decoder that maps tokens to logits a cache of keys and values.

    It changes the signature: inputs and outputs get the names that runners expect, caches and
    ``logits_to_keep`` come in, ``attention_mask`` has past tokens too. A decoder of tokens alone
    is given a mask and positions where that can be done: a padded row gives what it gives alone.

    Numerics: exact but for the order of sums; a prefill and decode steps are run by the evaluator
    and must agree with one full pass within 1e-4 relative.
    Scope: the whole Program, or nothing of it. Leaves: a Program that has a cache or does not
    generate, silently; with ``require`` also what does not generate is refused. Whatever relates
    tokens otherwise than causal attention does, with the node's name.

    Args:
        require: Whether a refusal is an error.
    """

    name: ClassVar[str] = "add-kv-cache"
    changes_signature: ClassVar[bool] = True
    require: bool = False

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        scores = program.signature.find(Role.LOGITS) is not None
        generates = scores and program.facts.task == "generate"
        if program.signature.has_cache or not (generates or self.require):
            return outcome
        try:
            outcome.hit(make_incremental(program))
        except NotIncrementalError as error:
            if self.require:
                raise
            outcome.miss(error.node, error.reason, "cache")
        return outcome


def make_incremental(program: Program) -> int:
    """Give ``program`` a cache, and return how many layers it remembers.

    Raises:
        NotIncrementalError: it cannot be proven right; the Program is as it was.
    """
    check_edge(program)
    made = program.clone()
    reading = read(made)
    check_logits(reading)
    padded = can_be_padded(reading)
    if padded:
        add_padding(made)
    caches = add_caches(reading, padded=padded)
    cut_logits(reading)
    _measure_tokens(made)
    sign(made, caches)
    learn(made, reading, caches)
    g.remove_dead(made.model)
    made.graph.sort()
    check_steps(program, made)
    program.components[program.main] = made.model
    program.signature, program.facts = made.signature, made.facts
    return reading.layers


def read(program: Program) -> DecoderReading:
    """Return where the tokens are in every value of a decoder.

    Raises:
        NotIncrementalError: an operator relates tokens in a way that a cache cannot follow.
    """
    reading = DecoderReading(program, Proofs(program))
    for role in (Role.TOKENS, Role.POSITIONS):
        if (value := program.input(role)) is not None:
            reading.flows[value] = Flow(((BATCH,), (TOKENS,)))
    for node in program.graph:
        carry(reading, node)
    return reading


def _measure_tokens(program: Program) -> None:
    """Let what asks the mask how many new tokens there are ask the tokens: the mask has more."""
    mask, tokens = program.input(Role.MASK), program.input(Role.TOKENS)
    for use in list(mask.uses()) if mask is not None else ():
        node: ir.Node = use.node
        ours = is_landmark(node.outputs[0], Landmark.TOTAL)
        if node.op_type == "Shape" and not ours and tokens is not None:
            node.replace_input_with(0, tokens)
