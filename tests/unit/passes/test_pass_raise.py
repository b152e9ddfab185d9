"""Attention that comes as an operator is given the dialect's form, or left with a reason."""

from __future__ import annotations

from typing import Final

import pytest
from support.programs import apply, error_rel, inputs, only, operators, program, reasons, run

from llmopt.ir import dialect
from llmopt.ir import graph as g
from llmopt.ir.feeds import Case
from llmopt.ir.program import Program

TOLERANCE: Final = 1e-5  # float32, max|a-b| / max|b|
EDGE: Final = "float[B,4,S,8] q, float[B,2,S,8] k, float[B,2,S,8] v"
CACHE: Final = "float[B,2,P,8] past_key, float[B,2,P,8] past_value"
SHOWN: Final = "float[B,2,T,8] present_key, float[B,2,T,8] present_value"
CONCAT: Final = """   present_key = Concat <axis = 2> (past_key, k)
   present_value = Concat <axis = 2> (past_value, v)
"""
CAUSAL: Final = """   t1 = Shape <start = 1, end = 2> (attention_mask)
   t = Squeeze (t1)
   s1 = Shape <start = 2, end = 3> (q)
   s = Squeeze (s1)
   p = Sub (t, s)
   i = Range (p, t, one)
   j = Range (zero, t, one)
   i2 = Unsqueeze (i, last)
   seen = LessOrEqual (j, i2)
"""
CONSTANTS: Final = "<int64 zero = {0}, int64 one = {1}, int64[1] last = {1}>"


def graph(inputs_: str, outputs: str, body: str) -> Program:
    return program(f"main ({inputs_}) => ({outputs})\n{CONSTANTS}\n{{\n{body}\n}}")


def equal(before: Program, after: Program, cases: tuple[Case, ...]) -> bool:
    for case in cases:
        given = inputs(before, case)
        want, got = run(before, given), run(after, given)
        if any(error_rel(got[name], want[name]) > TOLERANCE for name in want):
            return False
    return True


CASES: Final = (Case(3, 1, 6), Case(1, 5, 6), Case(3, 5, 0))


def test_an_attention_with_a_cache_of_its_own_keeps_it() -> None:
    body = (
        "   y, present_key, present_value = Attention <is_causal = 1>"
        " (q, k, v, , past_key, past_value)"
    )
    made = graph(f"{EDGE}, {CACHE}", f"float[B,4,S,8] y, {SHOWN}", body)
    before = made.clone()

    assert apply("raise-attention", made).applied == 1

    node = only(made, "Attention")
    assert [g.rank(value) for value in node.inputs if value is not None] == [3, 3, 3, 4, 4]
    assert g.attribute(node, "is_causal", 0) == 1
    assert not dialect.invariants(made.model)
    assert equal(before, made, CASES)


def test_concatenated_keys_become_the_operators_cache() -> None:
    body = f"{CONCAT}{CAUSAL}   y = Attention (q, present_key, present_value, seen)"
    made = graph(f"{EDGE}, {CACHE}, int64[B,T] attention_mask", f"float[B,4,S,8] y, {SHOWN}", body)
    before = made.clone()

    outcome = apply("raise-attention", made)

    assert outcome.applied == 1
    assert not outcome.missed
    assert "Concat" not in operators(made)
    assert g.attribute(only(made, "Attention"), "is_causal", 0) == 1
    assert equal(before, made, CASES)


def test_a_cache_whose_length_is_read_elsewhere_makes_no_cycle() -> None:
    body = (
        f"{CONCAT}{CAUSAL}   n = Shape (present_key)\n"
        "   y = Attention (q, present_key, present_value, seen)"
    )
    made = graph(
        f"{EDGE}, {CACHE}, int64[B,T] attention_mask",
        f"float[B,4,S,8] y, {SHOWN}, int64[4] n",
        body,
    )
    before = made.clone()

    assert apply("raise-attention", made).applied == 1

    assert g.optional(only(made, "Attention"), 4) is not None
    assert equal(before, made, CASES)


def test_a_causal_mask_on_keys_of_another_length_stays_explicit() -> None:
    body = (
        "   ck = Concat <axis = 2> (past_key, k)\n   cv = Concat <axis = 2> (past_value, v)\n"
        f"{CAUSAL}   y = Attention (q, ck, cv, seen)"
    )
    made = graph(f"{EDGE}, {CACHE}, int64[B,T] attention_mask", "float[B,4,S,8] y", body)
    before = made.clone()

    outcome = apply("raise-attention", made)

    assert "no cache that says where the queries stand" in reasons(outcome)
    assert [miss.kind for miss in outcome.missed] == ["mask"]
    node = only(made, "Attention")
    assert g.attribute(node, "is_causal", 0) == 0
    assert g.optional(node, 3) is not None
    assert equal(before, made, CASES)


def test_what_is_causal_without_a_past_does_not_become_causal_with_one() -> None:
    body = f"{CONCAT}   y = Attention <is_causal = 1> (q, present_key, present_value)"
    made = graph(f"{EDGE}, {CACHE}", f"float[B,4,S,8] y, {SHOWN}", body)
    before = made.clone()

    apply("raise-attention", made)

    assert g.optional(only(made, "Attention"), 4) is None
    assert equal(before, made, CASES)


def test_a_window_of_the_operator_and_one_of_the_mask_are_both_kept() -> None:
    body = f"{CAUSAL}   y = Attention <left_window_size = 2> (q, k, v, seen)"
    made = graph(f"{EDGE}, int64[B,S] attention_mask", "float[B,4,S,8] y", body)
    before = made.clone()

    assert apply("raise-attention", made).applied == 1

    node = only(made, "Attention")
    assert g.attribute(node, "left_window_size", -1) == 2
    assert g.attribute(node, "is_causal", 0) == 1
    assert g.optional(node, 3) is None
    assert equal(before, made, (Case(2, 7), Case(1, 1)))


def test_keys_repeated_for_each_head_but_not_values_stay_repeated() -> None:
    body = (
        "   k5 = Unsqueeze (k, two)\n   ke = Expand (k5, rep)\n   kr = Reshape (ke, four)\n"
        "   y = Attention (q, kr, w)"
    )
    made = program(
        f"main ({EDGE}, float[B,4,S,8] w) => (float[B,4,S,8] y)\n"
        "<int64[1] two = {2}, int64[5] rep = {1,1,2,1,1}, int64[4] four = {0,4,-1,8}>"
        f"\n{{\n{body}\n}}"
    )
    before = made.clone()

    assert apply("raise-attention", made).applied == 1

    assert g.attribute(only(made, "Attention"), "kv_num_heads", 0) == 4
    assert equal(before, made, (Case(2, 5),))


@pytest.mark.parametrize(
    ("edge", "body", "reason"),
    [
        pytest.param(
            f"{EDGE}, int64[B] n",
            "y = Attention (q, k, v, , , , n)",
            "lengths of padded keys",
            id="lengths",
        ),
        pytest.param(
            EDGE, "y, a, b, z = Attention (q, k, v)", "its scores have a reader", id="scores read"
        ),
        pytest.param(
            "float[B,H,S,8] q, float[B,H,S,8] k, float[B,H,S,8] v",
            "y = Attention (q, k, v)",
            "heads or width of Q are not known",
            id="heads unknown",
        ),
    ],
)
def test_what_the_form_has_no_place_for_is_missed(edge: str, body: str, reason: str) -> None:
    outputs = "float[B,4,S,8] y" if "4,S" in edge else "float[B,H,S,8] y"
    outputs += ", float[B,4,S,S] z" if " z " in body else ""

    outcome = apply("raise-attention", graph(edge, outputs, f"   {body}"))

    assert outcome.applied == 0
    assert reason in reasons(outcome)
    assert [miss.kind for miss in outcome.missed] == ["attention"]
