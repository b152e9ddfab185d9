"""Questions about a graph are answered right, and edits keep it valid."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.programs import evaluate, inputs, only, program

from llmopt.ir import dialect
from llmopt.ir import graph as g
from llmopt.ir.feeds import Case
from llmopt.ir.program import Program

TEXT = """main (float[B,S,4] x, float[4] given) => (float[B,S,4] y, float[B,S,4] z)
<float[4] w = {1,2,3,4}, float s = {2.5}, int64[2] i = {3,-1}>
{
   a = Mul (x, w)
   b = Add (a, a)
   y = Relu (b)
   z = Clip (b, s)
}"""


@pytest.fixture
def made() -> Program:
    return program(TEXT)


def value(of: Program, name: str) -> ir.Value:
    values = [v for n in of.graph for v in n.outputs]
    return next(
        v for v in (*values, *of.graph.inputs, *of.graph.initializers.values()) if v.name == name
    )


def test_producers_and_users(made: Program) -> None:
    a, b = value(made, "a"), value(made, "b")

    assert g.is_op(g.producer(b, "Mul", "Add"), "Add")
    assert g.producer(b, "Mul") is None
    assert g.producer(value(made, "x")) is None
    assert [n.op_type for n in g.users(a)] == ["Add"]
    assert g.sole_user(a) is g.sole_user(a, "Add")
    assert g.sole_user(a, "Mul") is None
    assert g.sole_user(b) is None
    assert g.sole_user(value(made, "y")) is None
    assert g.optional(only(made, "Clip"), 2) is None


def test_constants_and_what_is_none(made: Program) -> None:
    assert g.scalar(value(made, "s")) == 2.5
    assert g.scalar(value(made, "w")) is None
    assert g.ints(value(made, "i")) == [3, -1]
    assert g.ints(value(made, "x")) is None
    assert g.constant(value(made, "w"), 2) is None
    assert g.weight(value(made, "w")) is not None
    assert g.weight(value(made, "a")) is None
    assert g.constant(None) is None
    assert g.weight(None) is None
    assert g.shape(None) is None
    assert g.rank(None) is None


def test_an_initializer_that_a_caller_may_override_is_no_constant(made: Program) -> None:
    w = value(made, "w")
    made.graph.inputs.append(w)

    assert g.constant(w) is None
    assert g.weight(w) is None


def test_shapes_and_unknown_sizes(made: Program) -> None:
    a, x = value(made, "a"), value(made, "x")

    assert g.shape(x) == ["B", "S", 4]
    assert (g.static(x, -1), g.static(x, 0), g.static(x, 3)) == (4, None, None)
    a.shape = ir.Shape([None, None])
    sizes = g.shape(a)
    assert sizes is not None
    assert sizes[0] != sizes[1]


def test_broadcast_takes_what_is_not_one() -> None:
    shapes: list[list[int | str]] = [["B", 1, 1, "T"], ["S", 1]]
    first, second = (ir.Value(name="v", shape=ir.Shape(s)) for s in shapes)

    assert str(g.broadcast(first, second)) == "[B,1,S,T]"
    assert g.broadcast(first, ir.Value(name="unknown")) is None


def test_ancestors_are_in_order_and_stop_where_told(made: Program) -> None:
    y = value(made, "y")

    assert [n.op_type for n in g.ancestors([y])] == ["Mul", "Add", "Relu"]
    assert [n.op_type for n in g.ancestors([y], [value(made, "a")])] == ["Add", "Relu"]
    assert {v.name for v in g.roots([y])} == {"x", "w"}
    assert g.roots([value(made, "x")]) == [value(made, "x")]


def test_what_a_subgraph_reads_counts_as_read() -> None:
    made = program("""main (bool c, float[4] x) => (float[4] y) {
        a = Relu (x)
        y = If (c) <then_branch = t () => (float[4] p) { p = Abs (a) },
                    else_branch = e () => (float[4] q) { q = Neg (a) }>
    }""")

    assert "Relu" in [n.op_type for n in g.ancestors([made.graph.outputs[0]])]


def test_the_builder_names_what_it_makes_and_shares_constants(made: Program) -> None:
    node = only(made, "Add")
    node.name = "layers.0.block/Add"
    build = g.Builder(node)

    one, two = build.op("Relu", [value(made, "a")]), build.op("Relu", [value(made, "a")])
    third = build.constant([1, 2], "int64")

    assert (one.name, two.name) == ("layers.0.block/Relu", "layers.0.block/Relu_2")
    assert build.constant([1, 2], "int64") is third
    assert build.constant([1, 2], "int32") is not third
    assert build.constant([[1, 2]], "int64") is not third
    assert dialect.verify(made.model) == []


def test_long_constants_that_begin_alike_are_two(made: Program) -> None:
    build = g.Builder(made.graph)

    assert build.constant([1, 2, 3, 4, 5]) is not build.constant([1, 2, 3, 4, 6])


def test_a_replaced_output_keeps_its_name(made: Program) -> None:
    build = g.Builder(only(made, "Relu"))
    new = build.op("Abs", [value(made, "b")])

    g.replace(value(made, "y"), new)

    assert [v.name for v in made.graph.outputs] == ["y", "z"]
    assert g.shape(made.graph.outputs[0]) == ["B", "S", 4]
    assert dialect.verify(made.model) == []


def test_an_output_replaced_by_an_input_becomes_a_copy_of_it(made: Program) -> None:
    g.replace(value(made, "y"), value(made, "x"))
    g.remove_dead(made.model)

    given = inputs(made, Case(2, 3))
    np.testing.assert_array_equal(evaluate(made, given)["y"], given["x"])
    assert [v.name for v in made.graph.inputs] == ["x", "given"]


def test_replacing_an_output_alone_leaves_its_readers(made: Program) -> None:
    text = TEXT.replace("=> (float[B,S,4] y,", "=> (float[B,S,4] b, float[B,S,4] y,")
    made = program(text)
    old = value(made, "b")
    new = g.Builder(only(made, "Add")).op("Abs", [value(made, "a")])

    g.replace_output(old, new)

    assert made.graph.outputs[0] is new
    assert new.name == "b"
    assert [n.op_type for n in g.users(old)] == ["Relu", "Clip"]


def test_replacing_an_output_that_is_none_moves_its_readers(made: Program) -> None:
    new = g.Builder(only(made, "Add")).op("Abs", [value(made, "x")])

    g.replace_output(value(made, "b"), new)

    assert [n.op_type for n in g.users(new)] == ["Relu", "Clip"]


def test_names_are_used_once(made: Program) -> None:
    assert g.unused(made.graph, "fresh") == "fresh"
    assert g.unused(made.graph, "fresh") == "fresh_2"
    assert g.unused(made.graph, "w") == "w_2"
    assert g.unused(made.graph, "a") == "a_2"


def test_nodes_of_one_name_are_told_apart(made: Program) -> None:
    for node in made.graph:
        node.name = "same"

    g.name_nodes(made.graph)

    assert [node.name for node in made.graph] == ["same", "same_2", "same_3", "same_4"]


def test_a_new_value_has_the_type_and_shape_that_it_is_given() -> None:
    made = program("main (float[B,4] x) => (float[B,4] y) { y = Abs (x) }")
    x, build = made.graph.inputs[0], g.Builder(made.graph[0])

    same = build.op("Relu", [x], like=x)
    flat = build.op("Reshape", [x, build.constant([-1], "int64")], like=x, shape=[None])
    size = build.op("Shape", [x], shape=[2], dtype=ir.DataType.INT64)
    bare = build.op("Neg", [x])

    assert (same.shape, same.type) == (x.shape, x.type)
    assert (g.rank(flat), flat.type) == (1, x.type)
    assert (g.shape(size), size.dtype) == ([2], ir.DataType.INT64)
    assert (bare.shape, bare.type) == (None, None)
