"""A mixture of experts as torch's exporter writes it, for tests of passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llmopt.ir.program import Program
from support.programs import apply, bound

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
    "reshapes merged": {
        "column = Unsqueeze (repeated, last)": """columns = Constant <value_ints = [-1,48,1]> ()
   column = Reshape (expanded, columns)""",
        "index = Unsqueeze (flat, last)": "index = Identity (flat)",
        "GatherND (gate_up, index)": "Gather (gate_up, index)",
        "GatherND (down, index)": "Gather (down, index)",
    },
    "weighed by token": {
        "each = Squeeze (product2, last)": "each = Reshape (product2, by_token)",
        "weight = Unsqueeze (flat2, last)": "weight = Unsqueeze (share, last)",
        "split = Reshape (weighed, by_token)": "split = Identity (weighed)",
    },
}
"""How a mixture may share a token among its experts: what stands where in the text."""


def mixture(replaced: Mapping[str, str] | None = None) -> Program:
    """Return a mixture of experts, some lines of it replaced."""
    text = MIXTURE
    for line, instead in (replaced or {}).items():
        assert line in text
        text = text.replace(line, instead)
    made = bound(text, random_weights())
    apply("canonicalize", made)
    apply("remove-dead", made)
    return made


WEIGHED: Final = {
    "compared": """{equal}
   as{i} = Cast <to = 1> (is{i})
   kept{i} = Mul (share, as{i})
   share{i} = ReduceSum <keepdims = 1> (kept{i}, last)""",
    "where": """{equal}
   kept{i} = Where (is{i}, share, nothing)
   flat{i} = ReduceSum <keepdims = 0> (kept{i}, last)
   share{i} = Unsqueeze (flat{i}, last)""",
    "scattered": """column{i} = Gather <axis = -1> (every, n{i})
   share{i} = Unsqueeze (column{i}, last)""",
    "sliced": "share{i} = Slice (every, m{i}, m{next}, last)",
}
"""How the share of expert i may be made."""
EVERY: Final = """main (float[B,S,48] x, float[48,5] router{weights}) => (float[B,S,48] y)
<int64[1] k = {{2}}, int64[1] last = {{-1}}, float[1] nothing = {{0}}{numbers}>
{{
   logits = MatMul (x, router)
   chances = Softmax <axis = -1> (logits)
   top, chosen = TopK <axis = -1> (chances, k)
   total = ReduceSum <keepdims = 1> (top, last)
   share = Div (top, total)
   chances2 = Neg (share)
   sizes = Shape (chances)
   zeros = Expand (nothing, sizes)
   sizes2 = Shape (x)
   zeros2 = Expand (nothing, sizes2)
   every = ScatterElements <axis = -1> (zeros, chosen, share)
{experts}
   y = Identity (sum{end})
}}"""
EXPERT: Final = """   {share}
   h{i} = MatMul (x, gate_up{i})
   gate{i}, up{i} = Split <axis = 2, num_outputs = 2> (h{i})
   bent{i} = Swish (gate{i})
   gated{i} = Mul (bent{i}, up{i})
   gives{i} = MatMul (gated{i}, down{i})
   weighed{i} = Mul (share{i}, gives{i})
"""


def every_expert(shares: str, replaced: Mapping[str, str] | None = None) -> Program:
    """Return the same mixture with every expert computed, and weighed by ``WEIGHED[shares]``."""
    experts, numbers = "", ""
    for i in range(EXPERTS):
        equal = f"is{i} = Equal (chosen, n{i})"
        share = WEIGHED[shares].format(i=i, next=i + 1, equal=equal)
        experts += EXPERT.format(i=i, share=share)
        before = f"sum{i - 1}" if i else "zeros2"
        experts += f"   sum{i} = Add ({before}, weighed{i})\n"
        numbers += f", int64 n{i} = {{{i}}}"
    numbers += "".join(f", int64[1] m{i} = {{{i}}}" for i in range(EXPERTS + 1))
    arrays = random_weights()
    given = {"router": arrays["router"]}
    for i in range(EXPERTS):
        given[f"gate_up{i}"] = np.ascontiguousarray(arrays["gate_up"][i].T)
        given[f"down{i}"] = np.ascontiguousarray(arrays["down"][i].T)
    weights = "".join(
        f", float[{','.join(map(str, array.shape))}] {name}"
        for name, array in given.items()
        if name != "router"
    )
    text = EVERY.format(weights=weights, numbers=numbers, experts=experts, end=EXPERTS - 1)
    for line, instead in (replaced or {}).items():
        assert line in text
        text = text.replace(line, instead)
    made = bound(text, given)
    apply("canonicalize", made)
    apply("remove-dead", made)
    return made


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
