"""Parts of a graph are evaluated without running a layer, and refused where that cannot be."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from support.programs import program

from llmopt.interface.signature import Port, Role, Signature
from llmopt.ir import feeds
from llmopt.ir.feeds import Case, known, positions, resolve
from llmopt.ir.probe import Probe
from llmopt.ir.program import Facts, Program

SIZES = {"B": 2, "S": 3, "P": 4, "T": 7}


def probe(text: str) -> Probe:
    made = program(text)
    return Probe(made, [made.graph.outputs[0]])


def test_a_size_is_taken_from_the_symbols_and_no_layer_is_run() -> None:
    part = probe("""main (float[B,S,4] x) => (int64[n] y) <int64 one = {1}> {
        a = Relu (x)
        s = Shape <start = 1, end = 2> (a)
        n = Size (a)
        y = Add (s, n)
    }""")

    assert part.obstacle() is None
    assert part.reads() == set()
    (value,) = part.run({}, SIZES)
    assert value.tolist() == [3 + 2 * 3 * 4]


def test_inputs_are_read_by_name_and_constants_as_they_are() -> None:
    part = probe(
        "main (int64[B,S] position_ids) => (int64[B,S] y) <int64 two = {2}>"
        "{ y = Mul (position_ids, two) }"
    )
    given = {"position_ids": np.arange(6).reshape(2, 3)}

    assert part.reads() == {"position_ids"}
    np.testing.assert_array_equal(part.run(given, SIZES)[0], 2 * given["position_ids"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(
            "main (float[B,N,4] x) => (int64[3] y) { a = Relu (x)\n y = Shape (a) }",
            "a size of 'y' is unknown",
            id="an unknown symbol",
        ),
        pytest.param(
            "main (float[B,S] x) => (float[B,S] y) { y = RandomNormalLike (x) }",
            "cannot be evaluated ahead",
            id="random",
        ),
        pytest.param(
            """main (bool c) => (int64 y) {
            y = If (c) <then_branch = t () => (int64 p) { p = Constant <value_int = 1> () },
                        else_branch = e () => (int64 q) { q = Constant <value_int = 2> () }> }""",
            "If 'y' cannot be evaluated ahead",
            id="a branch",
        ),
    ],
)
def test_what_cannot_be_evaluated_says_why(text: str, reason: str) -> None:
    assert reason in str(probe(text).obstacle())


def test_sizes_that_do_not_fit_are_told_and_not_raised() -> None:
    part = probe(
        "main (int64[B,S] input_ids) => (int64[n] y)"
        "<int64[5] five = {0,1,2,3,4}, int64[1] i = {0}>"
        "{ s = Shape <start = 1, end = 2> (input_ids)\n e = Expand (i, s)\n y = Add (e, five) }"
    )

    assert isinstance(part.attempt({}, {**SIZES, "S": 5}), list)
    told = part.attempt({}, SIZES)
    assert isinstance(told, str)
    assert "cannot be evaluated for" in told


@pytest.mark.parametrize(
    ("dim", "size"),
    [(7, 7), ("B", 2), ("P + S", 7), ("2*S - 1", 5), ("T//2", 3), ("Max(B, S)", 3), ("-(-S)", 3)],
)
def test_dimensions_are_computed(dim: int | str, size: int) -> None:
    assert resolve(dim, SIZES) == size
    assert known(dim, SIZES) or dim == "Max(B, S)"


def test_a_dimension_that_is_no_expression_counts_as_two() -> None:
    assert resolve("?17.0", SIZES) == 2
    assert resolve("f(S)", SIZES) == 2
    assert not known("?17.0", SIZES)
    assert not known("N", SIZES)


def test_padding_leaves_a_token_in_every_row_and_none_in_the_first() -> None:
    for side in ("left", "right"):
        mask = Case(4, 3, 2, side).mask()
        assert mask[0].all()
        assert (mask.sum(1) >= 3).all()
        assert (mask.sum(1)[1:] < 5).all()
    assert Case(3, 1, 0, "left").mask().all()
    assert Case(2, 5, 3, "left").label == "B2 S5 P3 left"


def test_positions_count_unpadded_tokens() -> None:
    assert positions(np.array([[0, 1, 1], [1, 1, 0]])).tolist() == [[0, 0, 1], [0, 1, 0]]


def test_every_role_has_its_feed() -> None:
    ports = (
        Port("a", Role.TOKENS, "int64", ("B", "S")),
        Port("b", Role.MASK, "int32", ("B", "T")),
        Port("c", Role.POSITIONS, "int64", ("B", "S")),
        Port("d", Role.TOKEN_TYPES, "int64", ("B", "S")),
        Port("e", Role.PAST_KEY, "float16", ("B", 2, "P", 4), 0),
        Port("f", Role.LOGITS_TO_KEEP, "int64", ()),
        Port("g", Role.OTHER, "bool", ("B",)),
    )
    given = feeds.feeds(Signature(ports), Case(2, 5, 3, "left"), 9)

    assert {name: (str(a.dtype), a.shape) for name, a in given.items()} == {
        "a": ("int64", (2, 5)),
        "b": ("int32", (2, 8)),
        "c": ("int64", (2, 5)),
        "d": ("int64", (2, 5)),
        "e": ("float16", (2, 2, 3, 4)),
        "f": ("int64", ()),
        "g": ("bool", (2,)),
    }
    assert given["a"].max() < 9
    assert given["c"][1].tolist() == [2, 3, 4, 5, 6]
    assert {*given["d"].flat} == {0, 1}
    assert [*feeds.feeds(Signature(ports), Case(), 9, {"a"})] == ["a"]


def test_documented_examples() -> None:
    assert doctest.testmod(feeds).failed == 0


def test_a_program_finds_its_ports_and_clones_apart() -> None:
    made = program(
        """main (int64[B,S] input_ids, float[B,1,P,2] past_key_1) => (float[B,S,2] logits)
        <int64[1] i = {2}> {
            f = Cast <to = 1> (input_ids)
            u = Unsqueeze (f, i)
            logits = Concat <axis = 2> (u, u)
        }"""
    )
    copy = made.clone()
    copy.learn(task="generate")

    tokens = made.input(Role.TOKENS)
    assert tokens is not None
    assert tokens.name == "input_ids"
    assert made.input(Role.PAST_KEY, 0) is None
    assert made.input(Role.PAST_KEY, 1) is made.graph.inputs[1]
    assert made.output(Role.LOGITS) is made.graph.outputs[0]
    assert (made.facts.task, copy.facts.task) == ("raw", "generate")
    assert copy.graph is not made.graph
    assert isinstance(copy, Program)
    assert Facts().max_length == 0
