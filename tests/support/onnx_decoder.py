"""A decoder of one layer without a cache, made from ONNX's text form line by line."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmopt.interface.facts import ModelFacts
from llmopt.ir.program import Program
from support.programs import bound

VOCABULARY, HIDDEN, LIMIT = 11, 8, 16
EDGE = """main (int64[B,S] input_ids, float[11,8] table, float[16,8] learned, float[8,24] w,
 float[8,8] o, float[8,11] head{extra}) => (float[B,S,11] logits)
<int64 zero = {{0}}, int64 one = {{1}}, int64[1] at0 = {{0}}, int64[1] at1 = {{1}},
 int64[1] at2 = {{2}}, int64[1] end = {{100}}, float low = {{-1e9}}, float half = {{0.5}},
 int64[4] heads = {{0,0,2,4}}, int64[3] flat = {{0,0,8}}, float[1] slope = {{-0.3}},
 float[3,8,1] taps = {{{taps}}}, float[3,8,3] window = {{{window}}},
 int64[2] at12 = {{1,2}}, int64[S] place, float[S,8] placed>
{{
"""
COUNT = "count1 = Shape <start = 1, end = 2> (input_ids)"
BODY: Mapping[str, str] = {
    "count1": COUNT,
    "count": "count = Squeeze (count1)",
    "place": "place = Range (zero, count, one)",
    "placed": "placed = Gather (learned, place)",
    "looked": "looked = Gather (table, input_ids)",
    "x": "x = Add (looked, placed)",
    "extra": "y = Identity (x)",
    "qkv": "qkv = MatMul (y, w)",
    "split": "q, k, v = Split <axis = -1, num_outputs = 3> (qkv)",
    "q4": "q4 = Reshape (q, heads)",
    "k4": "k4 = Reshape (k, heads)",
    "v4": "v4 = Reshape (v, heads)",
    "qt": "qt = Transpose <perm = [0,2,1,3]> (q4)",
    "kt": "kt = Transpose <perm = [0,2,3,1]> (k4)",
    "vt": "vt = Transpose <perm = [0,2,1,3]> (v4)",
    "product": "product = MatMul (qt, kt)",
    "scores": "scores = Mul (product, half)",
    "row": "row = Unsqueeze (place, at1)",
    "column": "column = Unsqueeze (place, at0)",
    "later": "later = Greater (column, row)",
    "masked": "masked = Where (later, low, scores)",
    "weights": "weights = Softmax <axis = -1> (masked)",
    "sum": "sum = MatMul (weights, vt)",
    "turned": "turned = Transpose <perm = [0,2,1,3]> (sum)",
    "joined": "joined = Reshape (turned, flat)",
    "out": "out = MatMul (joined, o)",
    "final": "final = Add (x, out)",
    "logits": "logits = MatMul (final, head)",
}


def decoder(changed: Mapping[str, str] | None = None, *, extra: str = "") -> Program:
    """Return a decoder of one layer, some of its lines changed."""
    taps, window = (",".join(["0.5"] * count) for count in (24, 72))
    lines = {**BODY, **(changed or {})}
    text = (
        EDGE.format(extra=extra, taps=taps, window=window)
        + "\n".join(filter(None, lines.values()))
        + "\n}"
    )
    rng = np.random.default_rng(5)
    shapes = {"table": (11, 8), "learned": (16, 8), "w": (8, 24), "o": (8, 8), "head": (8, 11)}
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    made = bound(text, arrays)
    made.learn(task="generate", model=ModelFacts(max_length=LIMIT, vocabulary=VOCABULARY))
    return made
