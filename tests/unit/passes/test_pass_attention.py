"""Attention is recognized however it is written, and left alone where it is something else."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import onnx_ir as ir
import pytest
from support.programs import (
    apply,
    error_rel,
    evaluate,
    inputs,
    only,
    operators,
    program,
    reasons,
    run,
)
from support.spellings import HEADS, LOWS, MASKINGS, SCALES, WIDTH, Spelling, text

from llmopt.backends.onnxruntime.lower_attention import LowerAttention
from llmopt.ir import graph as g
from llmopt.ir.feeds import Case
from llmopt.ir.program import Program
from llmopt.passes.pipeline import Pipeline

PASSES: Final = "canonicalize,fuse-attention,raise-attention,cancel-transposes,canonicalize"
TOLERANCE: Final = 1e-5  # float32, max|a-b| / max|b| over unpadded positions
BASE: Final = Spelling()

SPELLINGS: Final = {
    **{f"scale {scale}": replace(BASE, scale=scale) for scale in SCALES},
    **{f"masked by {masking}": replace(BASE, masking=masking) for masking in MASKINGS},
    **{f"masked with {low}": replace(BASE, low=low, masking="add") for low in LOWS},
    "no mask": replace(BASE, causal=False, padding=False),
    "causal": replace(BASE, padding=False),
    "padding": replace(BASE, causal=False),
    "small window": replace(BASE, window=3),
    "window as wide as a probe": replace(BASE, window=5, padding=False),
    "large window": replace(BASE, window=30),
    "window without causal": replace(BASE, window=3, causal=False),
    "softcap": replace(BASE, softcap=True, scale="q"),
    "nan guard": replace(BASE, guard=True, low="inf"),
    "casts": replace(BASE, casts=True),
    "one group": replace(BASE, groups=1),
    "one group, broadcast": replace(BASE, groups=1, repeat="broadcast"),
    "as many groups as heads": replace(BASE, groups=HEADS),
    "cross": replace(BASE, cross=True, causal=False, padding=False, groups=HEADS),
    "cached": replace(BASE, cached=True),
    "cached, no padding": replace(BASE, cached=True, padding=False),
    "cached, window, softcap": replace(BASE, cached=True, window=3, softcap=True),
    "cached, large window": replace(BASE, cached=True, window=40),
}


def fused(spelling: Spelling) -> tuple[Program, Program]:
    """Return a Program before and after the passes."""
    before = program(text(spelling))
    return before, Pipeline.parse(PASSES).run(before.clone())


def matrix(spelling: Spelling) -> list[Case]:
    sides = ("none", "left", "right") if spelling.padding else ("none",)
    pasts = (0, 6) if spelling.cached else (0,)
    # GroupQueryAttention takes several new tokens after a past of one sequence only
    return [
        Case(1 if past and new > 1 else 3, new, past, side)
        for side in sides
        for past in pasts
        for new in (1, 7)
    ]


def check_numbers(before: Program, after: Program, spelling: Spelling) -> None:
    """Compare a Program, its fused form and its lowered form on the whole matrix."""
    lowered = Pipeline((LowerAttention(),)).run(after.clone())
    lowered.graph.opset_imports["com.microsoft"] = 1
    for case in matrix(spelling):
        given = inputs(before, case)
        want = evaluate(before, given)
        real = case.mask()[:, case.past :] == 1
        for got in (evaluate(after, given), run(after, given), run(lowered, given)):
            assert error_rel(got["y"], want["y"], real) < TOLERANCE, case.label


@pytest.mark.parametrize("name", SPELLINGS)
def test_it_is_fused_into_one_operator_that_computes_the_same(name: str) -> None:
    spelling = SPELLINGS[name]

    before, after = fused(spelling)

    node = only(after, "Attention")
    assert "Softmax" not in operators(after)
    assert g.attribute(node, "q_num_heads", 0) == HEADS
    assert g.attribute(node, "kv_num_heads", 0) == spelling.groups
    assert g.attribute(node, "is_causal", 0) == int(spelling.causal)
    assert g.attribute(node, "softcap", 0.0) == (5.0 if spelling.softcap else 0.0)
    scale = 1.0 if spelling.scale == "none" else WIDTH**-0.5
    assert g.attribute(node, "scale", 0.0) == pytest.approx(scale, rel=1e-6)
    assert g.attribute(node, "left_window_size", -1) == spelling.window - 1
    assert (g.optional(node, 4) is not None) == spelling.cached
    mask = g.optional(node, 3)
    assert (mask is not None) == spelling.padding
    if mask is not None:
        assert g.shape(mask) == ["B", 1, 1, "T" if spelling.cached else "S"]
    check_numbers(before, after, spelling)


def test_a_fused_program_has_no_reshape_or_transpose_left() -> None:
    _, after = fused(replace(BASE, cached=True))

    assert operators(after) == ["Cast", "Unsqueeze", "Attention"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        pytest.param(
            "raw = Softmax <axis = -1> (masked)",
            "raw = Softmax <axis = 2> (masked)",
            "over axis 2",
            id="softmax over queries",
        ),
        pytest.param(
            "weights = Identity (raw)", "weights = Mul (raw, d)", "go to Mul", id="scaled weights"
        ),
        pytest.param(
            "weights = Identity (raw)",
            "weights = Where (seen, raw, nought)",
            "go to Where",
            id="weights masked again",
        ),
        pytest.param(
            "masked = Where (seen, scores, low)",
            "masked = Where (seen, scores, nought)",
            "masked with 0",
            id="masked with zero",
        ),
        pytest.param(
            "masked = Where (seen, scores, low)",
            "filled = Where (seen, scores, low)\n   masked = Mul (filled, s)",
            "after they are masked",
            id="scaled after masking",
        ),
        pytest.param(
            "masked = Where (seen, scores, low)",
            "f0 = Where (seen, scores, low)\n   f1 = Tanh (f0)\n   masked = Mul (f1, cap)",
            "capped in 'f1' after",
            id="capped after masking",
        ),
        pytest.param(
            "scores = Identity (scaled)",
            "scores = Relu (scaled)",
            "pass through Relu",
            id="another function",
        ),
        pytest.param(
            "scaled = Mul (product, s)",
            "scaled = Neg (product)",
            "pass through Neg",
            id="negated",
        ),
        pytest.param(
            "scaled = Mul (product, s)",
            "n = Neg (s)\n   scaled = Mul (product, q1)\n   q1 = Neg (n)",
            "",
            id="scaled by what is computed",
        ),
    ],
)
def test_what_is_something_else_stays_with_a_reason(old: str, new: str, reason: str) -> None:
    spelled = text(BASE)
    assert spelled.count(old) == 1
    if not reason:
        old, new, reason = "Mul (product, s)", "Mul (product, product)", "scaled by no constant"
    made = program(spelled.replace(old, new))
    apply("canonicalize", made)

    outcome = apply("fuse-attention", made)

    assert outcome.applied == 0
    assert reason in reasons(outcome)
    assert [miss.kind for miss in outcome.missed] == ["attention"]


SMALL: Final = """main (float[B,2,S,4] q, float[B,2,T,4] k, float[B,2,T,4] v{more})
=> (float[B,2,S,4] y)
<float s = {{0.5}}, float low = {{-1e9}}, float[1,1,1,1] bias1 = {{1}}>
{{
   kt = Transpose <perm = [0,1,3,2]> (k)
   p = MatMul (q, kt)
   {middle}
   w = Softmax (m)
   y = MatMul (w, v)
}}"""


@pytest.mark.parametrize(
    ("more", "middle", "reason"),
    [
        pytest.param("", "m = Mul (p, low)", "is not positive", id="negative scale"),
        pytest.param("", "m = Div (s, p)", "scaled by no constant", id="divided by the scores"),
        pytest.param(
            ", bool[B,1,S,T] seen, float[B,2,S,T] f",
            "m = Where (seen, p, f)",
            "masked with no constant",
            id="filled with another value",
        ),
        pytest.param(
            ", float[B,2,S,1] f", "m = Add (p, f)", "not [..., S, T]", id="bias of one column"
        ),
        pytest.param(", float[T] f", "m = Add (p, f)", "not [..., S, T]", id="bias of rank 1"),
        pytest.param("", "m = Softmax (p)", "pass through Softmax", id="softmax twice"),
    ],
)
def test_scores_that_are_not_attentions_stay(more: str, middle: str, reason: str) -> None:
    outcome = apply("fuse-attention", program(SMALL.format(more=more, middle=middle)))

    assert outcome.applied == 0
    assert reason in reasons(outcome)


@pytest.mark.parametrize(
    ("edge", "reason"),
    [
        pytest.param("float[1,2,T,4] v", "differ in batch or heads", id="one batch for all"),
        pytest.param("float[B,1,T,4] v", "differ in batch or heads", id="one head of values"),
        pytest.param("float[T,4] v", "V is ['T', 4]", id="values of rank 2"),
    ],
)
def test_operands_that_only_matmul_broadcasts_stay(edge: str, reason: str) -> None:
    spelled = SMALL.format(more="", middle="m = Mul (p, s)").replace("float[B,2,T,4] v", edge)

    outcome = apply("fuse-attention", program(spelled))

    assert outcome.applied == 0
    assert reason in reasons(outcome)


def test_weights_that_are_an_output_stay() -> None:
    spelled = SMALL.format(more="", middle="m = Mul (p, s)")
    outcome = apply(
        "fuse-attention",
        program(spelled.replace("float[B,2,S,4] y)", "float[B,2,S,4] y, float[B,2,S,T] w)")),
    )

    assert reasons(outcome) == "its weights are a graph output"


def test_weights_that_two_products_read_stay() -> None:
    spelled = SMALL.format(more="", middle="m = Mul (p, s)")
    spelled = spelled.replace(
        "y = MatMul (w, v)", "a = MatMul (w, v)\n b = Relu (w)\n y = MatMul (b, v)"
    )

    assert "read by 2 nodes" in reasons(apply("fuse-attention", program(spelled)))


def test_scores_of_rank_5_and_scores_that_come_in_stay() -> None:
    spelled = """main (float[A,B,C,S,4] q, float[A,B,C,4,S] k, float[A,B,C,S,S] m,
     float[A,B,C,S,4] v) => (float[A,B,C,S,4] y)
    {
       p = MatMul (q, k)
       w = Softmax (p)
       z = Softmax (m)
       a = MatMul (w, v)
       b = MatMul (z, v)
       y = Add (a, b)
    }"""

    told = reasons(apply("fuse-attention", program(spelled)))

    assert "of rank 5" in told
    assert "'m' are an input" in told


def test_a_boolean_and_an_additive_mask_become_one() -> None:
    spelled = SMALL.format(
        more=", bool[B,1,S,T] seen, float[1,2,S,T] f",
        middle="a = Add (p, f)\n   u = Not (seen)\n"
        "   m0 = Where (u, low, a)\n   m = Add (m0, bias1)",
    ).replace("float[1,1,1,1] bias1 = {1}", "float[1,1] bias1 = {1}")
    assert "not [..., S, T]" in reasons(apply("fuse-attention", program(spelled)))
    made = program(spelled.replace("m = Add (m0, bias1)", "m = Identity (m0)"))
    before = made.clone()

    assert apply("fuse-attention", made).applied == 1

    mask = only(made, "Attention").inputs[3]
    assert mask is not None
    assert mask.dtype == ir.DataType.FLOAT
    for case in (Case(2, 3), Case(1, 5)):
        given = inputs(before, case)
        assert error_rel(evaluate(made, given)["y"], evaluate(before, given)["y"]) < TOLERANCE


@pytest.mark.parametrize(
    "middle",
    [
        pytest.param(
            "a = Add (p, f)\n   b = Add (a, f)\n   m = Where (seen, b, low)", id="two biases"
        ),
        pytest.param(
            "u = Not (seen)\n   a = Where (u, low, p)\n   m = Where (more, a, low)",
            id="two boolean masks",
        ),
        pytest.param("a = Where (less, low, p)\n   m = Add (f, a)", id="dropped, then a bias"),
    ],
)
def test_masks_that_come_together_become_one(middle: str) -> None:
    more = ", bool[B,1,S,T] seen, bool[S,T] more, bool[B,1,S,T] less0, float[1,2,S,T] f"
    spelled = SMALL.format(more=more, middle=f"less = Not (less0)\n   {middle}")
    # keys may also come tokens first, and be turned in one step
    spelled = spelled.replace("float[B,2,T,4] k", "float[B,T,2,4] k").replace(
        "perm = [0,1,3,2]", "perm = [0,2,3,1]"
    )
    made = program(spelled)
    before = made.clone()

    assert apply("fuse-attention", made).applied == 1

    for case in (Case(2, 3), Case(1, 5)):
        given = inputs(before, case)
        assert error_rel(evaluate(made, given)["y"], evaluate(before, given)["y"]) < TOLERANCE


def test_a_router_that_chooses_for_each_token_is_no_attention() -> None:
    spelled = """main (float[N,4] x, float[4,5] w, float[5,4] v) => (float[N,4] y)
    {
       p = MatMul (x, w)
       chosen = Softmax (p)
       y = MatMul (chosen, v)
    }"""

    outcome = apply("fuse-attention", program(spelled))

    assert (outcome.applied, outcome.missed) == (0, [])
