"""A mixture of experts as torch's exporter writes it, for tests of passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from programs import bound

from llmopt.ir.program import Program

EXPERTS, WIDE, INNER, CHOSEN = 5, 48, 32, 2  # INNER fills blocks of 32 and WIDE does not
NORMALIZED: Final = """total = ReduceSum <keepdims = 1> (top, last)
   share = Div (top, total)"""
MIXTURE: Final = """main (float[N,48] x, float[48,5] router, float[5,64,48] gate_up,
  float[5,48,32] down) => (float[N,48] y)
<int64[1] k = {2}, int64[1] last = {-1}, int64[1] one = {1}, int64[3] twice = {1,2,1},
 int64[2] rows = {-1,48}, int64[3] by_token = {-1,2,48}>
{
   logits = MatMul (x, router)
   chances = Softmax <axis = -1> (logits)
   top, chosen = TopK <axis = -1> (chances, k)
   total = ReduceSum <keepdims = 1> (top, last)
   share = Div (top, total)
   lifted = Unsqueeze (x, one)
   expanded = Expand (lifted, twice)
   repeated = Reshape (expanded, rows)
   flat = Reshape (chosen, last)
   index = Unsqueeze (flat, last)
   up_of = GatherND (gate_up, index)
   column = Unsqueeze (repeated, last)
   product = MatMul (up_of, column)
   h = Squeeze (product, last)
   gate, up = Split <axis = 1, num_outputs = 2> (h)
   bent = Swish (gate)
   gated = Mul (bent, up)
   down_of = GatherND (down, index)
   column2 = Unsqueeze (gated, last)
   product2 = MatMul (down_of, column2)
   each = Squeeze (product2, last)
   flat2 = Reshape (share, last)
   weight = Unsqueeze (flat2, last)
   weighed = Mul (each, weight)
   split = Reshape (weighed, by_token)
   y = ReduceSum <keepdims = 0> (split, one)
}"""


SHARES: Final = {
    "normalized": {},
    "as they are": {NORMALIZED: "", "(share, last)": "(top, last)"},
    "softmax of those chosen": {
        "(chances, k)": "(logits, k)",
        NORMALIZED: "share = Softmax <axis = -1> (top)",
    },
}
"""How a mixture may share a token among its experts: what stands where in the text."""


def mixture(replaced: Mapping[str, str] | None = None) -> Program:
    """Return a mixture of experts, some lines of it replaced."""
    text = MIXTURE
    for line, instead in (replaced or {}).items():
        assert line in text
        text = text.replace(line, instead)
    return bound(text, random_weights())


def random_weights() -> dict[str, npt.NDArray[Any]]:
    """Return the weights of the mixture by name."""
    rng = np.random.default_rng(3)
    shapes = {
        "router": (WIDE, EXPERTS),
        "gate_up": (EXPERTS, 2 * INNER, WIDE),
        "down": (EXPERTS, WIDE, INNER),
    }
    return {n: rng.standard_normal(s, np.float32) / np.float32(7) for n, s in shapes.items()}


def tokens(count: int = 9) -> dict[str, npt.NDArray[Any]]:
    """Return rows of so many tokens."""
    return {"x": np.random.default_rng(4).standard_normal((count, WIDE), np.float32)}
