"""A Program of an encoder and a decoder, by hand: a layer each, the decoder with a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from llmopt.frontend.base import Source
from llmopt.frontend.reference import Transform
from llmopt.interface.arrays import Arrays
from llmopt.ir.program import Program
from llmopt.verification.values import evaluated
from support.programs import bound

HEADS, WIDTH, HIDDEN, VOCABULARY = 4, 8, 32, 11
READS: Final = """encoder (int64[B,S] input_ids, int64[B,S] attention_mask, {weights})
  => (float[B,S,32] last_hidden_state, float[B,4,S,8] source_key_0, float[B,4,S,8] source_value_0)
<int64[2] one_two = {{1,2}}, int64[4] apart = {{0,0,4,8}}>
{{
   real2 = Cast <to = 9> (attention_mask)
   real = Unsqueeze (real2, one_two)
   x = Gather (table, input_ids)
   q = MatMul (x, wq)
   k = MatMul (x, wk)
   v = MatMul (x, wv)
   [reads] y = Attention <q_num_heads = 4, kv_num_heads = 4> (q, k, v, real)
   last_hidden_state = Add (x, y)
   keys = MatMul (last_hidden_state, wk2)
   values = MatMul (last_hidden_state, wv2)
   keys4 = Reshape (keys, apart)
   values4 = Reshape (values, apart)
   source_key_0 = Transpose <perm = [0, 2, 1, 3]> (keys4)
   source_value_0 = Transpose <perm = [0, 2, 1, 3]> (values4)
}}"""
WRITES: Final = """decoder (int64[B,S] input_ids, int64[B,T] attention_mask,
   float[B,4,P,8] past_key_0, float[B,4,P,8] past_value_0,
   float[B,4,C,8] source_key_0, float[B,4,C,8] source_value_0, {weights})
  => (float[B,S,11] logits, float[B,4,T,8] present_key_0, float[B,4,T,8] present_value_0)
<int64[2] one_two = {{1,2}}, int64[3] flat = {{0,0,32}}>
{{
   real2 = Cast <to = 9> (attention_mask)
   real = Unsqueeze (real2, one_two)
   x = Gather (table, input_ids)
   q = MatMul (x, wq)
   k = MatMul (x, wk)
   v = MatMul (x, wv)
   [writes] y, present_key_0, present_value_0 = Attention
     <is_causal = 1, q_num_heads = 4, kv_num_heads = 4> (q, k, v, real, past_key_0, past_value_0)
   h = Add (x, y)
   q2 = MatMul (h, wq2)
   keys = Transpose <perm = [0, 2, 1, 3]> (source_key_0)
   values = Transpose <perm = [0, 2, 1, 3]> (source_value_0)
   k2 = Reshape (keys, flat)
   v2 = Reshape (values, flat)
   [consults] z = Attention <q_num_heads = 4, kv_num_heads = 4> (q2, k2, v2)
   written = Add (h, z)
   [l0_out] logits = MatMul (written, head)
}}"""
_SQUARE: Final = (HIDDEN, HIDDEN)
_TABLE: Final = {"table": (VOCABULARY, HIDDEN)}
_OWN: Final = {
    "encoder": (READS, dict.fromkeys(("wq", "wk", "wv", "wk2", "wv2"), _SQUARE) | _TABLE),
    "decoder": (
        WRITES,
        dict.fromkeys(("wq", "wk", "wv", "wq2"), _SQUARE) | _TABLE | {"head": (HIDDEN, VOCABULARY)},
    ),
}


def encoder_decoder(limit: int = 12) -> Program:
    """Return the Program; ``limit`` is the most tokens: with few, the matrix is small."""
    parts = {}
    for seed, (name, (text, shapes)) in enumerate(_OWN.items()):
        rng = np.random.default_rng(seed)
        arrays = {n: rng.standard_normal(s).astype(np.float32) / 3 for n, s in shapes.items()}
        kinds = (f"float[{','.join(map(str, shape))}] {n}" for n, shape in shapes.items())
        parts[name] = bound(text.format(weights=", ".join(kinds)), arrays)
    facts = parts["decoder"].facts
    known = replace(facts.model, vocabulary=VOCABULARY, max_length=limit)
    return Program.joined(parts, replace(facts, model=known))


def source_of_both(program: Program) -> Source:
    """Return a Program as a source: what it computes now is what it should."""
    return Source("tiny", program, BothReference(program.clone()))


class BothReference:
    """Both components, run one after the other, without a cache.

    Args:
        program: They.
    """

    def __init__(self, program: Program) -> None:
        self._run = evaluated(program, exact=False)

    def run(self, batches: Sequence[Arrays], _: Transform | None = None) -> Iterator[Arrays]:
        """Yield what was read of each batch, and the logits."""
        for batch in batches:
            nothing = np.zeros((len(batch["input_ids"]), HEADS, 0, WIDTH), np.float32)
            found = self._run({**batch, "past_key_0": nothing, "past_value_0": nothing})
            yield {name: found[name] for name in ("last_hidden_state", "logits")}
