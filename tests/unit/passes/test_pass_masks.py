"""What a mask means is learned from what it computes, and never guessed."""

from __future__ import annotations

from typing import Final

import numpy as np
import pytest
from support.programs import program

from llmopt.ir.feeds import Case
from llmopt.ir.program import Program
from llmopt.passes.masks import Meaning, allowed_by, predict, understand

CONSTANTS: Final = """int64 zero = {0}, int64 one = {1}, int64[1] i0 = {0}, int64[1] i1 = {1},
int64[2] i01 = {0,1}, int64[2] i12 = {1,2},
int64[3] i012 = {0,1,2}, int64[1] i2 = {2},
int64 three = {3}, int64 four = {4}, int64 thirty = {30},
float fzero = {0}, float fone = {1}, float low = {-10000}, float min = {-3.4028234e38},
float ninf = {-inf}, float small = {-5}"""

SQUARE: Final = """
   n1 = Shape <start = 1, end = 2> (input_ids)
   n = Squeeze (n1)
   j = Range (zero, n, one)
   i = Unsqueeze (j, i1)
"""
PADDED: Final = """
   real2 = Cast <to = 9> (attention_mask)
   real = Unsqueeze (real2, i12)
"""


def mask_of(body: str, dtype: str = "bool", extra: str = "", limit: int = 64) -> Program:
    """Return a Program that computes ``mask`` from tokens and padding, without a cache."""
    return program(
        f"main (int64[B,S] input_ids, int64[B,S] attention_mask) => ({dtype}[A,H,Q,K] mask)\n"
        f"<{CONSTANTS}{extra}>\n{{\n{body}\n}}",
        limit=limit,
    )


def cached(body: str) -> Program:
    """Return a Program that computes ``mask`` for new tokens behind a cache."""
    return program(
        "main (int64[B,S] input_ids, int64[B,T] attention_mask, float[B,2,P,4] past_key)"
        f" => (bool[A,H,Q,K] mask, float[B,2,P,4] kept)\n<{CONSTANTS}>\n"
        "{\n   kept = Identity (past_key)\n"
        "   t1 = Shape <start = 1, end = 2> (attention_mask)\n   t = Squeeze (t1)\n"
        "   s1 = Shape <start = 1, end = 2> (input_ids)\n   s = Squeeze (s1)\n"
        "   p1 = Shape <start = 2, end = 3> (past_key)\n   p = Squeeze (p1)\n"
        "   j = Range (zero, t, one)\n   q = Range (p, t, one)\n   i = Unsqueeze (q, i1)\n"
        f"{body}\n}}"
    )


def meaning(of: Program) -> Meaning | str:
    return understand(of, of.graph.outputs[0])


@pytest.mark.parametrize(
    ("body", "dtype", "expected"),
    [
        pytest.param(
            f"{SQUARE} m = LessOrEqual (j, i)\n mask = Unsqueeze (m, i01)",
            "bool",
            Meaning(causal=True),
            id="less or equal",
        ),
        pytest.param(
            f"{SQUARE} d = Sub (i, j)\n m = GreaterOrEqual (d, zero)\n mask = Unsqueeze (m, i01)",
            "bool",
            Meaning(causal=True),
            id="difference not negative",
        ),
        pytest.param(
            f"{SQUARE} d = Sub (i, j)\n a = Abs (d)\n m = Less (a, four)\n"
            " mask = Unsqueeze (m, i01)",
            "bool",
            Meaning(left=3, right=3),
            id="window to both sides",
        ),
        pytest.param(
            f"{SQUARE} d = Sub (i, j)\n c = GreaterOrEqual (d, zero)\n w = LessOrEqual (d, four)\n"
            " m = And (c, w)\n mask = Unsqueeze (m, i01)",
            "bool",
            Meaning(causal=True, left=4),
            id="window as far as a small probe sees",
        ),
        pytest.param(
            f"{SQUARE} d = Sub (i, j)\n c = GreaterOrEqual (d, zero)\n w = Less (d, thirty)\n"
            " m = And (c, w)\n mask = Unsqueeze (m, i01)",
            "bool",
            Meaning(causal=True, left=29),
            id="large window",
        ),
        pytest.param(
            f"{SQUARE} m = LessOrEqual (i, j)\n mask = Unsqueeze (m, i01)",
            "bool",
            Meaning(left=0),
            id="only later ones",
        ),
        pytest.param(
            f"{PADDED} mask = Identity (real)", "bool", Meaning(padding=True), id="padding"
        ),
        pytest.param(
            f"{PADDED} mask = Where (real, fzero, min)",
            "float",
            Meaning(padding=True),
            id="padding added, lowest number",
        ),
        pytest.param(
            f"{PADDED} f = Cast <to = 1> (real)\n u = Sub (fone, f)\n mask = Mul (u, low)",
            "float",
            Meaning(padding=True),
            id="padding added, one minus mask times -10000",
        ),
        pytest.param(
            f"{PADDED}{SQUARE} m = LessOrEqual (j, i)\n b = And (m, real)\n"
            " mask = Where (b, fzero, ninf)",
            "float",
            Meaning(causal=True, padding=True),
            id="causal and padding added, minus infinity",
        ),
        pytest.param(
            f"{PADDED}{SQUARE} m = LessOrEqual (j, i)\n a = Where (m, fzero, min)\n"
            " p = Where (real, fzero, min)\n a4 = Unsqueeze (a, i01)\n mask = Add (a4, p)",
            "float",
            Meaning(causal=True, padding=True),
            id="two added masks, beyond the lowest number",
        ),
        pytest.param(
            f"{SQUARE} nn = Concat <axis = 0> (n1, n1)\n"
            " f = ConstantOfShape <value = float[1] {-1e9}> (nn)\n"
            " u = Trilu <upper = 1> (f, one)\n mask = Unsqueeze (u, i01)",
            "float",
            Meaning(causal=True),
            id="upper triangle of a constant",
        ),
        pytest.param(
            f"{PADDED} idx = Unsqueeze (attention_mask, i2)\n"
            " g = GatherND <batch_dims = 0> (yesno, idx)\n mask = Unsqueeze (g, i12)",
            "bool",
            Meaning(padding=True),
            id="looked up by GatherND",
        ),
        pytest.param(
            f"{SQUARE} o = Expand (fzero, n1)\n mask = Unsqueeze (o, i012)",
            "float",
            Meaning(),
            id="all seen",
        ),
    ],
)
def test_a_mask_is_what_it_does(body: str, dtype: str, expected: Meaning) -> None:
    extra = ", bool[2] yesno = {0,1}"

    assert meaning(mask_of(body, dtype, extra)) == expected


@pytest.mark.parametrize(
    ("compare", "expected"),
    [
        pytest.param("m = LessOrEqual (j, i)", Meaning(causal=True), id="causal"),
        pytest.param(
            "c = LessOrEqual (j, i)\n f = Sub (i, thirty)\n w = Greater (j, f)\n m = And (c, w)",
            Meaning(causal=True, left=29),
            id="large window",
        ),
        pytest.param(
            "c = LessOrEqual (j, i)\n f = Sub (i, three)\n w = Greater (j, f)\n m = And (c, w)",
            Meaning(causal=True, left=2),
            id="small window",
        ),
    ],
)
def test_a_mask_behind_a_cache_counts_from_the_past(compare: str, expected: Meaning) -> None:
    made = cached(f"{compare}\n mask = Unsqueeze (m, i01)")

    assert meaning(made) == expected


def test_a_causal_buffer_is_causal_and_a_band_in_it_is_seen() -> None:
    buffer = (
        f"{SQUARE} rows = Slice (table, i0, n1, i0)\n m = Slice (rows, i0, n1, i1)\n"
        " mask = Unsqueeze (m, i01)"
    )
    tril = np.tril(np.ones((64, 64), bool))
    for table, expected in (
        (tril, Meaning(causal=True)),
        (tril & ~np.tril(tril, -20), Meaning(causal=True, left=19)),
    ):
        numbers = ",".join(str(int(x)) for x in table.reshape(-1))
        extra = f", bool[64,64] table = {{{numbers}}}"
        assert meaning(mask_of(buffer, extra=extra)) == expected


@pytest.mark.parametrize(
    ("body", "dtype", "reason"),
    [
        pytest.param(
            f"{SQUARE} d = Sub (j, i)\n f = Cast <to = 1> (d)\n s = Mul (f, slopes)\n"
            " mask = Unsqueeze (s, i0)",
            "float",
            "values other than 0",
            id="linear bias",
        ),
        pytest.param(
            f"{SQUARE} d = Sub (i, j)\n m = LessOrEqual (d, reach)\n mask = Unsqueeze (m, i0)",
            "bool",
            "differs from head to head",
            id="another window for each head",
        ),
        pytest.param(
            f"{SQUARE} m = Less (j, i)\n mask = Unsqueeze (m, i01)",
            "bool",
            "not a combination",
            id="strictly before",
        ),
        pytest.param(
            f"{PADDED} u = Not (real)\n mask = Identity (u)",
            "bool",
            "not a combination",
            id="inverted",
        ),
        pytest.param(
            " t = Cast <to = 9> (input_ids)\n mask = Unsqueeze (t, i12)",
            "bool",
            "depends on input_ids",
            id="of the tokens",
        ),
        pytest.param(
            f"{PADDED} mask = Where (real, fzero, small)", "float", "values other", id="a mild bias"
        ),
        pytest.param(
            " mask = RandomUniform <shape = [1,1,1,1]> ()",
            "float",
            "cannot be evaluated",
            id="random",
        ),
        pytest.param(
            f"{SQUARE} m = Less (j, three)\n r = Concat <axis = 0> (m, m)\n"
            " mask = Unsqueeze (r, i012)",
            "bool",
            "does not broadcast",
            id="another shape",
        ),
        pytest.param(
            f"{SQUARE} m = Slice (row, i0, n1, i0)\n e = Equal (m, j)\n"
            " l = Less (j, thirty)\n c = And (e, l)\n mask = Unsqueeze (c, i012)",
            "bool",
            "cannot be evaluated for",
            id="a buffer shorter than the model's limit",
        ),
    ],
)
def test_what_is_more_than_a_mask_stays(body: str, dtype: str, reason: str) -> None:
    extra = (
        ", float[2,1,1] slopes = {0.5,0.25},"
        " int64[2,1,1] reach = {2,3},"
        " int64[20] row = {0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19}"
    )
    made = mask_of(body, dtype, extra)

    told = meaning(made)

    assert isinstance(told, str)
    assert reason in told


def test_a_window_too_long_to_try_stays() -> None:
    body = f"{SQUARE} d = Sub (i, j)\n m = Less (d, far)\n mask = Unsqueeze (m, i01)"
    extra = ", int64 far = {8000}"

    told = meaning(mask_of(body, extra=extra, limit=32000))

    assert told == "it may change at 8007 tokens, too many to try"


def test_a_window_beyond_the_longest_sequence_is_none() -> None:
    body = f"{SQUARE} d = Sub (i, j)\n a = Abs (d)\n m = Less (a, far)\n mask = Unsqueeze (m, i01)"
    extra = ", int64 far = {8000}"

    assert meaning(mask_of(body, extra=extra)) == Meaning()


def test_where_the_longest_sequence_is_unknown_a_window_is_still_seen() -> None:
    body = (
        f"{SQUARE} d = Sub (i, j)\n a = Abs (d)\n m = Less (a, thirty)\n mask = Unsqueeze (m, i01)"
    )

    told = meaning(mask_of(body, limit=0))

    assert told == Meaning(left=29, right=29)


def test_a_value_that_a_layer_computes_is_no_mask() -> None:
    made = program(
        "main (int64[B,S] input_ids, float[B,1,S,S] x) => (float[B,1,S,S] mask)"
        "{ a = Relu (x)\n mask = Identity (a) }"
    )

    assert meaning(made) == "it depends on x"


def test_allowed_by_takes_nearly_zero_for_zero_and_refuses_a_bias() -> None:
    assert np.array_equal(allowed_by(np.array([1e-8, -1e9, -np.inf])), [True, False, False])
    assert isinstance(allowed_by(np.array([0.0, -0.5])), str)


def test_prediction_of_a_window_behind_a_past() -> None:
    allowed, rows = predict(Meaning(causal=True, left=1), Case(1, 2, 3))

    assert allowed[0].astype(int).tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert rows.tolist() == [[True, True]]
