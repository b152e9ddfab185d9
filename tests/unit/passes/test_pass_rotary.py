"""Rotary embedding is recognized, its angles become one table, and nothing else does."""

from __future__ import annotations

from typing import Final

import numpy as np
import pytest
from support.programs import apply, error_rel, evaluate, inputs, only, operators, program, reasons

from llmopt.ir.feeds import Case
from llmopt.ir.graph import attribute, static
from llmopt.ir.program import Program

TOLERANCE: Final = 1e-6  # float32, max|a-b| / max|b|
BODY: Final = """main (float[B,2,S,8] x, {edge}) => (float[B,2,S,8] y)
<float[1,1,4] freq = {{1,0.5,0.25,0.125}}, int64[1] two = {{2}}, int64[1] one = {{1}},
 int64[1] i0 = {{0}}, int64[1] i4 = {{4}}, int64[1] i8 = {{8}}, int64[1] axis = {{-1}},
 float half = {{0.5}}, int64 zero = {{0}}, int64 unit = {{1}}, int64[2] halves = {{4,4}}>
{{
   {positions}
   p3 = Unsqueeze (position, two)
   pf = Cast <to = 1> (p3)
   angle = Mul (pf, freq)
   both = Concat <axis = -1> (angle, angle)
   cos0 = Cos (both)
   sin0 = Sin (both)
   cos = Unsqueeze (cos0, one)
   sin = Unsqueeze (sin0, one)
   lower = Slice (x, i0, i4, axis)
   upper = Slice (x, i4, i8, axis)
   neg = Neg (upper)
   turned = Concat <axis = -1> (neg, lower)
   a = Mul (x, cos)
   b = Mul (turned, sin)
   y = Add (a, b)
}}"""
GIVEN: Final = BODY.format(
    edge="int64[B,S] position_ids", positions="position = Identity (position_ids)"
)
_REPEATED: Final = """angle1 = Unsqueeze (angle, axis)
   pairs = Concat <axis = -1> (angle1, angle1)
   three = Constant <value_ints = [0, 0, 8]> ()
   both = Reshape (pairs, three)"""
_STACKED: Final = """neg1 = Unsqueeze (neg, axis)
   lower1 = Unsqueeze (lower, axis)
   stack = Concat <axis = -1> (neg1, lower1)
   turned = Reshape (stack, flat)"""
COUNTED: Final = BODY.format(
    edge="int64[B,S] input_ids",
    positions="""n1 = Shape <start = 1, end = 2> (input_ids)
   n = Squeeze (n1)
   row = Range (zero, n, unit)
   position = Unsqueeze (row, i0)""",
)
BEHIND: Final = BODY.format(
    edge="int64[B,S] input_ids, float[B,2,P,8] past_key",
    positions="""n1 = Shape <start = 1, end = 2> (input_ids)
   n = Squeeze (n1)
   p1 = Shape <start = 2, end = 3> (past_key)
   p = Squeeze (p1)
   e = Add (n, p)
   row = Range (p, e, unit)
   position = Unsqueeze (row, i0)""",
)
# GPT-J's and Cohere's: each number turns with its neighbour
TWINS: Final = (
    GIVEN.replace("both = Concat <axis = -1> (angle, angle)", _REPEATED)
    .replace("Slice (x, i0, i4, axis)", "Slice (x, i0, i8, axis, i2)")
    .replace("Slice (x, i4, i8, axis)", "Slice (x, one, i8, axis, i2)")
    .replace("turned = Concat <axis = -1> (neg, lower)", _STACKED)
    .replace("int64[1] i0 = {0}", "int64[1] i0 = {0}, int64[1] i2 = {2}, int64[4] flat = {0,0,0,8}")
)
TOKENS_FIRST: Final = (
    TWINS.replace("[B,2,S,8]", "[B,S,2,8]")
    .replace("Unsqueeze (cos0, one)", "Unsqueeze (cos0, two)")
    .replace("Unsqueeze (sin0, one)", "Unsqueeze (sin0, two)")
)
# DeepSeek's: each half is computed apart, of angles told once
APART: Final = (
    GIVEN.replace("Cos (both)", "Cos (angle)")
    .replace("Sin (both)", "Sin (angle)")
    .replace("   neg = Neg (upper)\n   turned = Concat <axis = -1> (neg, lower)\n", "")
    .replace(
        "a = Mul (x, cos)\n   b = Mul (turned, sin)\n   y = Add (a, b)",
        """lc = Mul (lower, cos)
   us = Mul (upper, sin)
   uc = Mul (upper, cos)
   ls = Mul (lower, sin)
   first = Sub (lc, us)
   second = Add (uc, ls)
   y = Concat <axis = -1> (first, second)""",
    )
)
TAKEN_APART: Final = (
    APART.replace("Slice (x, i0, i4, axis)", "Slice (x, i0, i8, axis, i2)")
    .replace("Slice (x, i4, i8, axis)", "Slice (x, one, i8, axis, i2)")
    .replace("int64[1] i0 = {0}", "int64[1] i0 = {0}, int64[1] i2 = {2}")
)


def equal(before: Program, after: Program, cases: tuple[Case, ...]) -> bool:
    pairs = [
        (evaluate(after, given), evaluate(before, given))
        for given in (inputs(before, case) for case in cases)
    ]
    return all(error_rel(got["y"], want["y"]) < TOLERANCE for got, want in pairs)


@pytest.mark.parametrize(
    ("text", "cases"),
    [
        pytest.param(GIVEN, (Case(1, 7), Case(3, 5, 0, "left")), id="positions given"),
        pytest.param(COUNTED, (Case(1, 7), Case(3, 5)), id="positions counted"),
        pytest.param(BEHIND, (Case(1, 7, 9), Case(3, 5)), id="positions behind a cache"),
        pytest.param(
            GIVEN.replace(
                "lower = Slice (x, i0, i4, axis)", "lower, upper = Split <axis = 3> (x, halves)"
            )
            .replace("   upper = Slice (x, i4, i8, axis)\n", "")
            .replace("turned = Concat <axis = -1>", "turned = Concat <axis = 3>"),
            (Case(2, 5),),
            id="halves by Split",
        ),
        pytest.param(
            GIVEN.replace("cos0 = Cos (both)", "c1 = Cos (both)\n   cos0 = Mul (c1, half)"),
            (Case(2, 5),),
            id="scaled tables",
        ),
        pytest.param(
            GIVEN.replace("a = Mul (x, cos)", "a = Mul (cos, x)").replace(
                "y = Add (a, b)", "y = Add (b, a)"
            ),
            (Case(2, 5),),
            id="operands in the other order",
        ),
    ],
)
def test_it_becomes_one_operator_with_a_table(text: str, cases: tuple[Case, ...]) -> None:
    made = program(text)
    before = made.clone()

    assert apply("fuse-rotary", made).applied == 1

    node = only(made, "RotaryEmbedding")
    cos, sin = (node.inputs[i].const_value for i in (1, 2))  # type: ignore[union-attr]
    assert cos is not None
    assert sin is not None
    assert list(cos.shape) == list(sin.shape) == [64, 4]
    assert "Cos" not in operators(made)
    assert equal(before, made, cases)


@pytest.mark.parametrize(
    ("text", "interleaved"),
    [
        pytest.param(TWINS, 1, id="neighbours"),
        pytest.param(TOKENS_FIRST, 1, id="neighbours, tokens before heads"),
        pytest.param(APART, 0, id="halves computed apart"),
        pytest.param(TAKEN_APART, 0, id="neighbours that leave as halves"),
    ],
)
def test_other_spellings_are_the_same_operator(text: str, interleaved: int) -> None:
    made = program(text)
    before = made.clone()

    assert apply("fuse-rotary", made).applied == 1

    node = only(made, "RotaryEmbedding")
    assert attribute(node, "interleaved", 0) == interleaved
    assert static(node.inputs[1], 1) == 4
    assert equal(before, made, (Case(1, 7), Case(3, 5, 0, "left")))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        pytest.param("(x, one, i8", "(x, i0, i8", "neither the halves of x", id="one number twice"),
        pytest.param("(angle1, angle1)", "(angle1, pf0)", "differ", id="other angles"),
    ],
)
def test_neighbours_that_do_not_turn_together_stay(old: str, new: str, reason: str) -> None:
    text = TWINS.replace(old, new).replace("   pairs =", "   pf0 = Neg (angle1)\n   pairs =")
    found = reasons(apply("fuse-rotary", program(text)))

    assert reason in found


def test_two_rotations_share_their_tables() -> None:
    text = GIVEN.replace(
        "y = Add (a, b)",
        "r = Add (a, b)\n   b2 = Mul (turned, sin)\n   y0 = Add (a, b2)\n   y = Add (r, y0)",
    )
    made = program(text)

    assert apply("fuse-rotary", made).applied == 2

    first, second = (node for node in made.graph if node.op_type == "RotaryEmbedding")
    assert first.inputs[1:] == second.inputs[1:]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        pytest.param(
            "upper = Slice (x, i4, i8, axis)",
            "upper = Slice (x, i0, i4, axis)",
            "neither the halves of x",
            id="the same half twice",
        ),
        pytest.param(
            "neg = Neg (upper)",
            "o = Relu (x)\n   u = Slice (o, i4, i8, axis)\n   neg = Neg (u)",
            "neither the halves of x",
            id="the half of another value",
        ),
        pytest.param(
            "both = Concat <axis = -1> (angle, angle)",
            "h = Mul (angle, half)\n   both = Concat <axis = -1> (angle, h)",
            "its halves differ",
            id="other angles in the second half",
        ),
        pytest.param(
            "pf = Cast <to = 1> (p3)",
            "pf0 = Cast <to = 1> (p3)\n   top = ReduceMax (pf0)\n   pf = Add (pf0, top)",
            "depend on more than the position",
            id="angles that depend on the length",
        ),
    ],
)
def test_another_rotation_stays_with_a_reason(old: str, new: str, reason: str) -> None:
    outcome = apply("fuse-rotary", program(GIVEN.replace(old, new)))

    assert outcome.applied == 0
    assert reason in reasons(outcome)
    assert [miss.kind for miss in outcome.missed] == ["rotary"]


def test_angles_of_the_tokens_are_no_table() -> None:
    text = BODY.format(edge="int64[B,S] input_ids", positions="position = Identity (input_ids)")

    assert "depends on input_ids" in reasons(apply("fuse-rotary", program(text)))


def test_angles_of_an_activation_are_no_table() -> None:
    text = BODY.format(edge="float[B,S] z", positions="position = Relu (z)")

    assert "depends on z" in reasons(apply("fuse-rotary", program(text)))


def test_without_a_longest_sequence_there_is_no_table() -> None:
    assert "longest sequence is not known" in reasons(apply("fuse-rotary", program(GIVEN, limit=0)))


def test_a_short_longest_sequence_gives_a_short_table() -> None:
    made = program(GIVEN, limit=6)

    assert apply("fuse-rotary", made).applied == 1

    table = only(made, "RotaryEmbedding").inputs[1]
    assert table is not None
    assert table.const_value is not None
    np.testing.assert_array_equal(
        table.const_value.numpy()[:, 0], np.cos(np.arange(6, dtype=np.float32))
    )


def test_heads_must_be_known() -> None:
    text = GIVEN.replace("float[B,2,S,8]", "float[B,H,S,8]")

    assert "not [batch, heads, tokens, width]" in reasons(apply("fuse-rotary", program(text)))
