"""A decoder of one layer as a Program, made from text: quick, where tracing would take seconds."""

from __future__ import annotations

from typing import Final

import numpy as np

from llmopt.interface.facts import ModelFacts
from llmopt.interface.signature import Signature
from llmopt.ir import graph as g
from llmopt.ir.last_tokens import LOGITS_TO_KEEP, keep_last
from llmopt.ir.program import Program
from support.programs import bound

HEADS, WIDTH, HIDDEN, VOCABULARY, LENGTH = 2, 16, 32, 11, 64
TEXT: Final = """main (int64[B,S] input_ids, int64[B,T] attention_mask, int64[B,S] position_ids,
 float[B,1,P,16] past_key_0, float[B,1,P,16] past_value_0, float[11,32] table, float[32] scale,
 float[32,64] w, float[32,32] o, float[32,11] head, float[64,8] cos, float[64,8] sin)
=> (float[B,S,11] logits, float[B,1,T,16] present_key_0, float[B,1,T,16] present_value_0)
<int64[2] i12 = {1,2}, int64[3] parts = {32,16,16}>
{
   real2 = Cast <to = 9> (attention_mask)
   [padding_mask] real = Unsqueeze (real2, i12)
   hidden = Gather (table, input_ids)
   normed = RMSNormalization (hidden, scale)
   qkv = MatMul (normed, w)
   q, k, v = Split <axis = -1> (qkv, parts)
   qr = RotaryEmbedding <num_heads = 2> (q, cos, sin, position_ids)
   kr = RotaryEmbedding <num_heads = 1> (k, cos, sin, position_ids)
   y, present_key_0, present_value_0 = Attention
     <is_causal = 1, q_num_heads = 2, kv_num_heads = 1> (qr, kr, v, real, past_key_0, past_value_0)
   out = MatMul (y, o)
   sum = Add (hidden, out)
   [last] tokens = Identity (sum)
   final = RMSNormalization (tokens, scale)
   logits = MatMul (final, head)
}"""


def tiny_decoder(*, keep: bool = False, text: str = TEXT) -> Program:
    """Return it; with ``keep`` it gives logits of the last tokens alone, one by default."""
    rng = np.random.default_rng(3)
    angles = np.arange(LENGTH)[:, None] * 100.0 ** (-np.arange(8) / 8)
    arrays = {
        "table": rng.standard_normal((VOCABULARY, HIDDEN)),
        "scale": rng.uniform(0.5, 1.5, HIDDEN),
        "w": rng.standard_normal((HIDDEN, 64)) / 4,
        "o": rng.standard_normal((HIDDEN, HIDDEN)) / 4,
        "head": rng.standard_normal((HIDDEN, VOCABULARY)) / 4,
        "cos": np.cos(angles),
        "sin": np.sin(angles),
    }
    made = bound(text, {name: array.astype(np.float32) for name, array in arrays.items()})
    facts = ModelFacts(
        family="tiny",
        layers=1,
        heads=HEADS,
        kv_heads=1,
        head_width=WIDTH,
        hidden=HIDDEN,
        vocabulary=VOCABULARY,
        max_length=LENGTH,
        eos=(VOCABULARY,),
    )
    made.learn(task="generate", model=facts)
    if keep:
        _keep_last(made)
    return made


def _keep_last(made: Program) -> None:
    node = next(node for node in made.graph if node.name == "last")
    cut = keep_last(made.graph, g.operand(node, 0))
    g.replace(node.outputs[0], cut)
    g.remove_dead(made.model)
    made.signature = Signature((*made.signature.inputs, LOGITS_TO_KEEP), made.signature.outputs)
    made.graph.sort()
