"""Products of [batch * heads, ...] get four axes, and attention is then recognized."""

from __future__ import annotations

from typing import Final

import pytest
from support.programs import apply, error_rel, evaluate, inputs, only, operators, program

from llmopt.ir import graph as g
from llmopt.ir.feeds import Case
from llmopt.ir.program import Program
from llmopt.passes.pipeline import Pipeline

TOLERANCE: Final = 1e-5  # float32, max|a-b| / max|b|
# BLOOM's: queries, keys and values of [B * H, S, D], and a bias that is added to their product
FLAT: Final = """main (float[B,2,S,8] q, float[B,2,S,8] k, float[B,2,S,8] v, float[B,2,S] bias)
 => (float[B,2,S,8] y)
<int64[1] i8 = {8}, int64[1] heads = {2}, int64[1] one = {1}, float scale = {0.3},
 float[N,S,8] q3, float[N,S,8] k3, float[N,S,8] v3, float[N,1,S] b3, float[N,8,S] kt,
 float[N,S,S] product, float[N,S,S] scaled, float[N,S,S] scores3, float[B,2,S,S] scores,
 float[B,2,S,S] weights, float[N,S,S] weights3, float[N,S,8] y3>
{
   batch = Shape <start = 0, end = 1> (q)
   tokens = Shape <start = 2, end = 3> (q)
   rows = Mul (batch, heads)
   flat = Concat <axis = 0> (rows, tokens, i8)
   flat_bias = Concat <axis = 0> (rows, one, tokens)
   square = Concat <axis = 0> (rows, tokens, tokens)
   four = Concat <axis = 0> (batch, heads, tokens, tokens)
   four_out = Concat <axis = 0> (batch, heads, tokens, i8)
   q3 = Reshape (q, flat)
   k3 = Reshape (k, flat)
   v3 = Reshape (v, flat)
   b3 = Reshape (bias, flat_bias)
   kt = Transpose <perm = [0, 2, 1]> (k3)
   product = MatMul (q3, kt)
   scaled = Mul (product, scale)
   scores3 = Add (scaled, b3)
   scores = Reshape (scores3, four)
   weights = Softmax <axis = -1> (scores)
   weights3 = Reshape (weights, square)
   y3 = MatMul (weights3, v3)
   y = Reshape (y3, four_out)
}"""
# as nn.MultiheadAttention computes the weights that it returns: nothing tells the heads apart
ONE_HEAD: Final = """main (float[N,S,8] q, float[N,T,8] k, float[N,T,8] v, float[N,1,T] bias)
 => (float[N,S,8] y)
{
   kt = Transpose <perm = [0, 2, 1]> (k)
   product = MatMul (q, kt)
   scores = Add (product, bias)
   weights = Softmax <axis = -1> (scores)
   y = MatMul (weights, v)
}"""


def check_equal(before: Program, after: Program) -> None:
    for case in (Case(1, 5), Case(3, 7)):
        given = inputs(before, case)
        assert error_rel(evaluate(after, given)["y"], evaluate(before, given)["y"]) < TOLERANCE


def test_the_reshape_moves_up_to_the_operands() -> None:
    made = program(FLAT)
    before = made.clone()

    assert apply("split-heads", made).applied == 2

    products = g.nodes(made.graph, "MatMul")
    assert [[g.rank(v) for v in node.inputs] for node in products] == [[4, 4], [4, 4]]
    assert apply("split-heads", made).applied == 0
    check_equal(before, made)


def test_attention_is_then_fused() -> None:
    made = program(FLAT)
    before = made.clone()

    Pipeline.parse("split-heads,fuse-attention").run(made)

    only(made, "Attention")
    assert "Softmax" not in operators(made)
    check_equal(before, made)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("y3 = MatMul (weights3, v3)", "y3 = Identity (v3)", id="no product"),
        pytest.param("float[N,S,8] y3", "float[N,8,S] y3", id="more than the first axis"),
    ],
)
def test_another_reshape_stays(old: str, new: str) -> None:
    assert apply("split-heads", program(FLAT.replace(old, new))).applied == 1


def test_heads_that_are_not_told_apart_are_sequences_of_one_head() -> None:
    made = program(ONE_HEAD)
    before = made.clone()

    Pipeline.parse("fuse-attention").run(made)

    assert g.shape(only(made, "Attention").inputs[0])[1] == 1  # type: ignore[index]
    check_equal(before, made)
