"""A pattern matches the formula that it spells, and nothing else."""

from __future__ import annotations

import pytest
from support.programs import program

from llmopt.ir.match import Pattern, const, either, match, matches, op

TEXT = """main (float[4] x, float[4] z) => (float[4] y)
<float two = {2}, float almost = {2.00001}, float three = {3}>
{
   a = Pow (x, two)
   b = Mul (a, three)
   c = Mul (three, z)
   d = Sub (b, c)
   s, t = Split <num_outputs = 2> (x)
   e = Softmax <axis = 0> (d)
   f = Clip (e, , three)
   y = Mul (f, f)
}"""


@pytest.mark.parametrize(
    ("name", "pattern", "found"),
    [
        pytest.param("a", op("Pow", "x", const(2.0)), True, id="number"),
        pytest.param("a", op("Pow", "x", const(2.00001)), True, id="number, nearly"),
        pytest.param("a", op("Pow", "x", const(3.0)), False, id="another number"),
        pytest.param("a", op("Pow", "v", "v"), False, id="one name for two values"),
        pytest.param("y", op("Mul", "v", "v"), True, id="one name for one value"),
        pytest.param("c", op("Mul", "z", const(3.0)), True, id="either order"),
        pytest.param("d", op("Sub", "v", op("Pow", "x", "p")), False, id="no other order"),
        pytest.param(
            "b", op("Mul", either(op("Abs", "x"), op("Pow", "x", "p")), "k"), True, id="one of"
        ),
        pytest.param("e", op("Softmax", "v", axis=0), True, id="attribute"),
        pytest.param("e", op("Softmax", "v", axis=1), False, id="another attribute"),
        pytest.param("t", op("Split", "x"), False, id="second output"),
        pytest.param("s", op("Split", "x"), True, id="first output"),
        pytest.param("f", op("Clip", "v", "low"), False, id="an absent operand"),
        pytest.param("a", op("Pow", "x", "p", "q"), False, id="more operands than there are"),
        pytest.param(
            "d",
            op("Sub", op("Mul", "v", const("k")), op("Mul", "w", const("k"))),
            True,
            id="number twice",
        ),
        pytest.param(
            "d",
            op("Sub", op("Mul", op("Pow", "x", const("k")), const("k")), "w"),
            False,
            id="two numbers of a name",
        ),
    ],
)
def test_a_pattern_matches(name: str, pattern: Pattern, found: bool) -> None:
    made = program(TEXT.replace("y) ", "y) "))
    values = {v.name: v for node in made.graph for v in node.outputs}

    assert (match(pattern, values[name]) is not None) == found


def test_a_match_binds_values_numbers_and_the_root() -> None:
    made = program(TEXT)
    values = {v.name: v for node in made.graph for v in node.outputs}

    bound = match(op("Mul", op("Pow", "base", const("power")), "factor"), values["b"])

    assert bound is not None
    assert bound["base"].name == "x"
    assert bound["power"] == 2.0
    assert bound["factor"].name == "three"
    assert bound["root"] is values["b"].producer()


def test_every_order_is_found() -> None:
    made = program(TEXT)
    values = {v.name: v for node in made.graph for v in node.outputs}

    found = [(b["l"].name, b["r"].name) for b in matches(op("Mul", "l", "r"), values["c"])]

    assert found == [("three", "z"), ("z", "three")]


def test_keepdims_counts_as_written_where_it_is_not() -> None:
    made = program(
        "main (float[2,4] x) => (float[2,1] a, float[2] b) <int64[1] i = {1}>"
        "{ a = ReduceMean (x, i)\n b = ReduceMean <keepdims = 0> (x, i) }"
    )
    kept = op("ReduceMean", "x", "axes", keepdims=1)

    assert [match(kept, v) is not None for v in made.graph.outputs] == [True, False]
