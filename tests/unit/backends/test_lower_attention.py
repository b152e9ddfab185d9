"""Lowered attention computes what the standard operator does, or is left as it is."""

from __future__ import annotations

from typing import Final

import pytest
from support.programs import error_rel, inputs, only, operators, program, run

from llmopt.backends.onnxruntime import finish
from llmopt.backends.onnxruntime.lower_attention import LowerAttention
from llmopt.ir.feeds import Case
from llmopt.ir.program import Program

TOLERANCE: Final = 1e-5  # float32, max|a-b| / max|b| over unpadded positions
PAD: Final = """   real2 = Cast <to = 9> (attention_mask)
   [padding_mask] real = Unsqueeze (real2, i12)
"""
SELF: Final = """main (float[B,S,64] q, float[B,S,64] k, float[B,S,64] v{more}) => (float[B,S,64] y)
<int64[2] i12 = {{1,2}}, float nought = {{0}}, float low = {{-1e9}}>
{{
{prelude}   y = Attention <q_num_heads = 4, kv_num_heads = 4{attributes}> (q, k, v{mask})
}}"""
MASKED: Final = ", int64[B,S] attention_mask"


def lower(made: Program) -> tuple[Program, list[str]]:
    low = made.clone()
    outcome = LowerAttention().run(low)
    finish(low.model)
    return low, [miss.reason for miss in outcome.missed]


def worst(made: Program, low: Program, cases: tuple[Case, ...]) -> float:
    errors = []
    for case in cases:
        given = inputs(made, case)
        real = case.mask()[:, case.past :] == 1
        want, got = run(made, given), run(low, given)
        errors.append(error_rel(got["y"], want["y"], real))
    return max(errors)


@pytest.mark.parametrize(
    ("more", "prelude", "attributes", "mask"),
    [
        pytest.param("", "", "", "", id="all seen"),
        pytest.param("", "", ", is_causal = 1", "", id="causal"),
        pytest.param("", "", ", scale = 0.1", "", id="scale"),
        pytest.param(MASKED, PAD, "", ", real", id="padding"),
        pytest.param(MASKED, PAD, ", is_causal = 1", ", real", id="causal and padding"),
        pytest.param(", float[1,4,S,S] bias", "", "", ", bias", id="bias for each head"),
        pytest.param(", float[B,4,S,S] bias", "", "", ", bias", id="bias for each sequence"),
        pytest.param(", float[B,1,1,S] bias", "", "", ", bias", id="bias of one row"),
        pytest.param(", float[S,S] bias", "", "", ", bias", id="bias of rank 2"),
        pytest.param(", float[4,S,S] bias", "", "", ", bias", id="bias of rank 3"),
        pytest.param(
            MASKED,
            PAD.replace("[padding_mask] ", "") + "   b = Where (real, nought, low)\n",
            "",
            ", b",
            id="padding as a bias",
        ),
        pytest.param(
            MASKED, PAD.replace("[padding_mask] ", ""), "", ", real", id="another boolean mask"
        ),
    ],
)
def test_attention_without_a_cache_becomes_multi_head_attention(
    more: str, prelude: str, attributes: str, mask: str
) -> None:
    made = program(SELF.format(more=more, prelude=prelude, attributes=attributes, mask=mask))

    low, missed = lower(made)

    assert missed == []
    assert "MultiHeadAttention" in operators(low)
    sides = ("left", "right") if more == MASKED else ("none",)
    cases = tuple(Case(3, new, 0, side) for side in sides for new in (1, 7))
    assert worst(made, low, cases) < TOLERANCE


def test_keys_of_another_sequence_become_multi_head_attention() -> None:
    made = program(
        """main (float[B,S,64] q, float[B,X,64] k, float[B,X,32] v) => (float[B,S,32] y)
    { y = Attention <q_num_heads = 4, kv_num_heads = 4> (q, k, v) }"""
    )

    low, missed = lower(made)

    assert missed == []
    assert operators(low) == ["MultiHeadAttention"]
    assert worst(made, low, (Case(2, 7),)) < TOLERANCE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(", softcap = 5.0", "no softcap", id="softcap"),
        pytest.param(", left_window_size = 3", "no window", id="window"),
        pytest.param(", right_window_size = 3", "no window", id="window ahead"),
    ],
)
def test_what_multi_head_attention_has_not_stays(change: str, reason: str) -> None:
    made = program(SELF.format(more="", prelude="", attributes=change, mask=""))

    low, missed = lower(made)

    assert operators(low) == ["Attention"]
    assert reason in missed[0]
    assert worst(made, low, (Case(2, 7),)) == 0


CACHED: Final = """main (float[B,S,{q}] q, float[B,S,32] k, float[B,S,{v}] v{more},
 float[B,2,P,{d}] past_key, float[B,2,P,{w}] past_value)
=> (float[B,S,{y}] y, float[B,2,T,{d}] present_key, float[B,2,T,{w}] present_value)
<int64[2] i12 = {{1,2}}>
{{
{prelude}   y, present_key, present_value = Attention
   <q_num_heads = 4, kv_num_heads = 2{attributes}> (q, k, v, {mask}, past_key, past_value)
}}"""
FULL: Final = ", int64[B,T] attention_mask"
STEPS: Final = (Case(3, 1, 6), Case(1, 5, 6), Case(3, 7, 0))


def cached(more: str = "", prelude: str = "", attributes: str = "", mask: str = "") -> Program:
    text = CACHED.format(
        more=more, prelude=prelude, attributes=attributes, mask=mask, q=64, v=32, d=16, w=16, y=64
    )
    return program(text)


@pytest.mark.parametrize("attributes", ["", ", left_window_size = 2", ", softcap = 5.0"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_attention_with_a_cache_becomes_grouped(attributes: str, side: str) -> None:
    padded = side != "none"
    causal = f", is_causal = 1{attributes}"
    made = cached(FULL, PAD if padded else "", causal, "real" if padded else "")

    low, missed = lower(made)

    assert missed == []
    assert "GroupQueryAttention" in operators(low)
    assert low.facts.model.cache == "shared"
    cases = tuple(Case(c.batch, c.new, c.past, side) for c in STEPS)
    assert worst(made, low, cases) < TOLERANCE


def test_a_cache_without_a_mask_counts_its_keys() -> None:
    made = cached(attributes=", is_causal = 1")

    low, missed = lower(made)

    assert missed == []
    assert worst(made, low, STEPS) < TOLERANCE


@pytest.mark.parametrize(
    ("more", "prelude", "attributes", "mask", "reason"),
    [
        pytest.param("", "", "", "", "is causal, this is not", id="not causal"),
        pytest.param(
            ", float[B,1,1,T] bias",
            "",
            ", is_causal = 1",
            "bias",
            "not padding alone",
            id="a bias of the shape of padding",
        ),
        pytest.param(
            "", "", ", is_causal = 1, right_window_size = 0", "", "to the right", id="right window"
        ),
    ],
)
def test_what_grouped_attention_has_not_stays(
    more: str, prelude: str, attributes: str, mask: str, reason: str
) -> None:
    low, missed = lower(cached(more, prelude, attributes, mask))

    assert "Attention" in operators(low)
    assert reason in missed[0]
    assert low.facts.model.cache == "concat"


@pytest.mark.parametrize(
    ("widths", "reason"),
    [
        pytest.param(
            {"q": 64, "v": 16, "d": 16, "w": 8, "y": 32}, "one head width for all", id="values"
        ),
        pytest.param({"q": 32, "v": 16, "d": 8, "w": 8, "y": 32}, "multiple of 16", id="narrow"),
    ],
)
def test_widths_that_grouped_attention_has_not_stay(widths: dict[str, int], reason: str) -> None:
    text = CACHED.format(more="", prelude="", attributes=", is_causal = 1", mask="", **widths)
    if widths["d"] == 8:
        text = text.replace("float[B,S,32] k", "float[B,S,16] k")

    low, missed = lower(program(text))

    assert reason in missed[0]
    assert "Attention" in operators(low)


def test_a_foreign_node_of_the_paddings_name_is_a_mask_like_any_other() -> None:
    prelude = (
        PAD.replace("[padding_mask] real =", "pad =")
        + """   none = Not (pad)
   all = Or (pad, none)
"""
    )
    made = program(SELF.format(more=MASKED, prelude=prelude, attributes="", mask=", all"))
    only(made, "Or").name = "padding_mask"

    low, missed = lower(made)

    assert missed == []
    assert worst(made, low, (Case(3, 7, 0, "left"),)) < TOLERANCE
