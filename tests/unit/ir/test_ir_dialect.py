"""The verifier finds what a Program must not be, and nothing in one that is well-formed."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from support.programs import only, program

from llmopt.ir import dialect

TEXT = "main (float[B,4] x) => (float[B,4] y) { a = Relu (x)\n y = Abs (a) }"


def test_a_well_formed_program_has_no_problem() -> None:
    assert dialect.verify(program(TEXT).model) == []


def test_another_opset_is_a_problem() -> None:
    made = program(TEXT)
    made.graph.opset_imports[""] = 20

    assert dialect.verify(made.model) == ["opset 20, not 25"]


def test_a_vendors_operator_is_a_problem() -> None:
    made = program(TEXT)
    only(made, "Relu").domain = "com.microsoft"

    assert dialect.verify(made.model) == ["Relu 'a' is of domain 'com.microsoft'"]


def test_a_value_read_before_it_is_made_is_a_problem() -> None:
    made = program(TEXT)
    relu, absolute = only(made, "Relu"), only(made, "Abs")
    made.graph.remove(relu)
    made.graph.insert_after(absolute, relu)

    assert dialect.verify(made.model) == ["Abs 'y' reads 'a' before it is made"]


def test_a_value_that_nothing_makes_is_a_problem() -> None:
    made = program(TEXT)
    only(made, "Abs").replace_input_with(0, ir.Value(name="ghost"))

    assert dialect.verify(made.model) == ["Abs 'y' reads 'ghost' before it is made"]


def test_an_output_that_nothing_makes_is_a_problem() -> None:
    made = program(TEXT)
    made.graph.outputs.append(ir.Value(name="ghost"))

    assert dialect.verify(made.model) == ["output 'ghost' is made by nothing"]


def test_a_name_used_twice_is_a_problem() -> None:
    made = program(TEXT)
    only(made, "Relu").outputs[0].name = "x"

    assert dialect.verify(made.model) == ["2 values are named 'x'"]


def test_functions_are_a_problem() -> None:
    made = program(TEXT)
    inner = ir.Graph([], [], nodes=[], opset_imports={"": 25})
    made.model.functions[("here", "F", "")] = ir.Function("here", "F", graph=inner, attributes=[])

    assert "1 functions that are not inlined" in dialect.verify(made.model)


def problems(edge: str, body: str) -> str:
    return "; ".join(dialect.invariants(program(f"main ({edge}) => ({body}").model))


QKV = "float[B,S,8] q, float[B,S,8] k, float[B,S,8] v"


@pytest.mark.parametrize(
    ("edge", "body", "problem"),
    [
        pytest.param(
            QKV,
            "float[B,S,8] y) { y = Attention"
            " <q_num_heads = 2, kv_num_heads = 2, is_causal = 1> (q, k, v) }",
            "",
            id="well-formed",
        ),
        pytest.param(
            "float[B,2,S,4] q, float[B,2,S,4] k, float[B,2,S,4] v",
            "float[B,2,S,4] y) { y = Attention (q, k, v) }",
            "must be [batch, tokens, heads * width]",
            id="rank 4",
        ),
        pytest.param(
            "float[B,S,8] q, float[B,X,8] k, float[B,X,8] v",
            "float[B,S,8] y) { y = Attention"
            " <q_num_heads = 2, kv_num_heads = 2, is_causal = 1> (q, k, v) }",
            "aligns top-left",
            id="causal with other keys",
        ),
        pytest.param(
            "float[B,S,8] x, float[3,S,2] c, float[3,S,2] s",
            "float[B,S,8] y) { y = RotaryEmbedding <num_heads = 2> (x, c, s) }",
            "table of batch 3",
            id="table of another batch",
        ),
        pytest.param(
            "float[B,S,8] x, float[64,2] c, float[64,2] s, int64[B,S] p",
            "float[B,S,8] y) { y = RotaryEmbedding <num_heads = 2> (x, c, s, p) }",
            "",
            id="table of positions",
        ),
        pytest.param(
            "float[B,S,8] x, float[8] w",
            "float[B,S,8] y) { y = RMSNormalization <axis = 2> (x, w) }",
            "",
            id="last axis by number",
        ),
        pytest.param(
            "float[B,4,8] x, float[4,8] w",
            "float[B,4,8] y) { y = RMSNormalization <axis = 1> (x, w) }",
            "axis must be the last",
            id="two axes",
        ),
        pytest.param(
            "float[B,S,8] x, float[1] w",
            "float[B,S,8] y) { y = LayerNormalization (x, w) }",
            "one number per channel",
            id="one scale",
        ),
    ],
)
def test_invariants_of_the_operators(edge: str, body: str, problem: str) -> None:
    found = problems(edge, body)

    assert problem in found
    assert bool(found) == bool(problem)


def test_heads_must_divide_and_a_cache_is_four_values() -> None:
    made = program(
        f"main ({QKV}, float[B,2,P,4] pk, float[B,2,P,4] pv) => (float[B,S,8] y) "
        "{ y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v, , pk, pv) }"
    )
    assert "go together" in "; ".join(dialect.invariants(made.model))

    only(made, "Attention").attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", 3)
    assert "2 query heads cannot share 3" in "; ".join(dialect.invariants(made.model))
