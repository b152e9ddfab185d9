"""The passes that turn the dialect into what TVM's kernels compute, and what they leave alone."""

from __future__ import annotations

import numpy as np
import pytest
from support.programs import only, operators, program, reasons

from llmopt.backends.tvm.linear import key_of
from llmopt.backends.tvm.lower_attention import LowerPackedAttention
from llmopt.backends.tvm.lower_linear import LowerLinear
from llmopt.backends.tvm.sizes import bounds, evaluate, known
from llmopt.ir import graph as g
from llmopt.passes.fold_weights import FoldWeights
from llmopt.passes.narrow_weights import NarrowWeights
from llmopt.passes.quantize_weights import QuantizeWeights

CACHED = """main (float[B,S,E] x, float[B,S,20] row, int64[B,S] position_ids,
      float[B,2,P,2] past_key_0, float[B,2,P,2] past_value_0)
   => (float[B,S,12] y, float[B,2,T,2] present_key_0, float[B,2,T,2] present_value_0)
<int64[3] parts = {12, 4, 4}, float[4,1] cos = {1,1,1,1}, float[4,1] sin = {0,0,0,0},
 int64[4] q_heads = {0,0,6,2}, int64[4] k_heads = {0,0,2,2}, int64[3] q_flat = {0,0,12},
 int64[3] k_flat = {0,0,4}, float[2] w = {1,2}>
"""
ATTENTION = """
   y, present_key_0, present_value_0 =
      Attention <q_num_heads = 6, kv_num_heads = 2, is_causal = 1, scale = 0.5>
      (q, k, v, , past_key_0, past_value_0)
"""
ROTATED = """
   q0, k0, v = Split <axis = -1> (row, parts)
   q = RotaryEmbedding <num_heads = 6> (q0, cos, sin, position_ids)
   k = RotaryEmbedding <num_heads = 2> (k0, cos, sin, position_ids)
"""
NORMED = """
   q0, k0, v = Split <axis = -1> (row, parts)
   q1 = Reshape (q0, q_heads)
   q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
   q3 = RMSNormalization <epsilon = 1e-6> (q2, w)
   q4 = Transpose <perm = [0, 2, 1, 3]> (q3)
   q = Reshape (q4, q_flat)
   k1 = Reshape (k0, k_heads)
   k3 = RMSNormalization <epsilon = 1e-6> (k1, w)
   k = Reshape (k3, k_flat)
"""


def test_rotation_and_cache_become_one_operator() -> None:
    made = program(CACHED + "{" + ROTATED + ATTENTION + "}")

    assert LowerPackedAttention().run(made).applied == 1
    node = only(made, "CachedAttention")
    assert operators(made) == ["CachedAttention"]
    assert [v.name if v else None for v in node.inputs][:6] == [
        "row", None, None, "cos", "sin", "position_ids",
    ]  # fmt: skip
    assert g.attribute(node, "scale", 0.0) == 0.5
    assert [value.name for value in made.graph.outputs] == ["y", "present_key_0", "present_value_0"]


def test_norms_of_heads_go_into_it_whichever_way_heads_lie() -> None:
    made = program(CACHED + "{" + NORMED + ATTENTION + "}")

    assert LowerPackedAttention().run(made).applied == 1
    assert operators(made) == ["CachedAttention"]
    assert g.attribute(only(made, "CachedAttention"), "epsilon", 0.0) == pytest.approx(1e-6)


def test_parts_of_several_values_are_put_together() -> None:
    text = ROTATED.replace("q0, k0, v = Split", "a, k0, v = Split") + "\n q0 = Neg (a)\n"
    lines = text.strip().splitlines()
    ordered = [lines[0], lines[-1], *lines[1:-1]]
    made = program(CACHED + "{" + "\n".join(ordered) + ATTENTION + "}")

    assert LowerPackedAttention().run(made).applied == 1
    assert operators(made) == ["Split", "Neg", "Concat", "CachedAttention"]


def test_what_the_kernels_do_not_compute_is_left() -> None:
    text = CACHED + "{" + ROTATED.replace("(k0, cos, sin", "(k0, sin, sin") + ATTENTION + "}"
    made = program(text)
    outcome = LowerPackedAttention().run(made)

    assert (outcome.applied, "Attention" in operators(made)) == (0, True)
    assert "Q and K are turned in different ways" in reasons(outcome)
    other = program(
        """main (float[B,S,8] x, bool[B,1,S,S] m) => (float[B,S,8] y) {
   y = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, x, m)
}"""
    )
    assert "its mask is more than padding" in reasons(LowerPackedAttention().run(other))


EPILOGUE = """main (float[B,S,4] x, float[B,S,6] r) => (float[B,S,6] y)
<float[4,6] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6}, float[6] b = {1,2,3,4,5,6}>
{
   m = MatMul (x, w)
   a = Add (b, m)
   c = Gelu (a)
   y = Add (r, c)
}"""


def test_a_bias_a_gelu_and_a_residual_follow_the_product() -> None:
    made = program(EPILOGUE)

    assert LowerLinear().run(made).applied == 1
    node = only(made, "Linear")
    assert g.attribute(node, "epilogue", "") == "bias,gelu,residual"
    assert [v.name if v else None for v in node.inputs] == ["x", "w", None, "b", "r"]
    assert LowerLinear().run(made).applied == 0


@pytest.mark.parametrize(
    ("old", "new", "epilogue"),
    [
        ("c = Gelu (a)", 'c = Gelu <approximate = "tanh"> (a)', "bias,gelu_tanh,residual"),
        ("c = Gelu (a)", "c = Mul (a, a)", "bias"),
        ("y = Add (r, c)", "y = Mul (r, c)", "bias,gelu"),
        ("a = Add (b, m)", "a = Add (r, m)", "residual"),
        ("y = Add (r, c)", "y = Add (m, c)", ""),
    ],
)
def test_what_reads_a_product_twice_or_otherwise_stays(old: str, new: str, epilogue: str) -> None:
    made = program(EPILOGUE.replace(old, new))
    LowerLinear().run(made)

    assert g.attribute(only(made, "Linear"), "epilogue", None) == epilogue


GATED = """main (float[B,S,4] x) => (float[B,S,3] y)
<float[4,6] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6}, int64[2] parts = {3, 3}>
{
   m = MatMul (x, w)
   gate, up = Split <axis = -1> (m, parts)
   s = Swish (gate)
   y = Mul (up, s)
}"""


def test_a_gated_feed_forward_follows_the_product() -> None:
    made = program(GATED)
    LowerLinear().run(made)

    assert g.attribute(only(made, "Linear"), "epilogue", "") == "swiglu"
    other = program(GATED.replace("s = Swish (gate)", "s = Swish <alpha = 2.0> (gate)"))
    LowerLinear().run(other)
    assert operators(other) == ["Linear", "Split", "Swish", "Mul"]


def test_a_rounded_table_and_its_tied_head_read_the_same_codes() -> None:
    numbers = ",".join(map(str, range(11 * 16)))
    made = program(
        f"""main (int64[B,S] input_ids) => (float[B,S,11] logits)
<float[11,16] e = {{{numbers}}}, float[16,11] h = {{{numbers}}}>
{{
   x = Gather (e, input_ids)
   logits = MatMul (x, h)
}}""",
        weights=["e", "h"],
    )
    QuantizeWeights(bits=4, block=16).run(made)
    LowerLinear().run(made)

    assert operators(made) == ["GatherRows", "Linear"]
    assert g.attribute(only(made, "GatherRows"), "scheme", "") == "w4{block=16}"


def test_a_table_in_bfloat16_and_its_tied_head_read_the_same_weight() -> None:
    made = program(
        """main (int64[B,S] input_ids) => (float[B,S,3] logits)
<float[3,2] e = {1.001, 2, 3, 4, 5, 6}>
{
   x = Gather (e, input_ids)
   t = Transpose <perm = [1, 0]> (e)
   logits = MatMul (x, t)
}""",
        weights=["e"],
    )
    FoldWeights().run(made)
    rounded = NarrowWeights().rounding(made, lambda _, array: array)
    assert NarrowWeights().run(made).applied == 2
    assert operators(made).count("Cast") == 2
    LowerLinear().run(made)

    assert operators(made) == ["GatherRows", "Linear"]
    rows, product = only(made, "GatherRows"), only(made, "Linear")
    assert g.attribute(product, "scheme", "") == g.attribute(rows, "scheme", "") == "bf16"
    assert key_of(rows) == key_of(product)
    table = np.asarray([[1.001, 2], [3, 4], [5, 6]], np.float32)
    assert rounded("e", table)[0].tolist() == [1, 2]
    assert rounded("f", table) is table


def test_slices_count_from_the_end_as_onnx_does() -> None:
    assert bounds(10, -3, 1 << 40) == (7, 10)
    assert bounds(10, 2, 99) == (2, 10)
    assert bounds(10, -(1 << 40), -1) == (0, 9)


def test_arithmetic_on_sizes_needs_no_code() -> None:
    made = program(
        """main (int64[3] s) => (int64[1] y)
<int64[1] one = {1}, int64[1] zero = {0}, int64[1] three = {3}, int64[1] rest = {-1}>
{
   a = Slice (s, one, three)
   b = Mul (a, a)
   c = Gather (s, zero)
   d = Concat <axis = 0> (b, c)
   e = Squeeze (c)
   f = Unsqueeze (e, zero)
   h = Sub (d, f)
   i = Neg (h)
   j = Cast <to = 7> (i)
   k = Reshape (e, rest)
   l = Cast <to = 1> (k)
   y = Slice (j, zero, one)
}"""
    )
    values = {"s": known([2, 3, 5])}
    values |= {
        str(v.name): known(v.const_value.numpy())
        for v in made.graph.initializers.values()
        if v.const_value is not None
    }
    for node in made.graph:
        found = evaluate(node, [values.get(str(v.name)) for v in node.inputs if v is not None])
        if found is not None:
            values[str(node.outputs[0].name)] = found

    assert values["d"].tolist() == [9, 25, 2]
    assert values["j"].tolist() == [-7, -23, 0]
    assert values["y"].tolist() == [-7]
    assert "l" not in values
    assert np.asarray(values["e"]).ndim == 0
