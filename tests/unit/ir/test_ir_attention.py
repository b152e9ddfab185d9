"""The view of an Attention reads what the operator's schema says, and writes it back."""

from __future__ import annotations

import pytest
from support.programs import only, program

from llmopt.ir.attention import AttentionAttributes, AttentionOp, kept

QKV = "float[B,S,8] q, float[B,S,8] k, float[B,S,8] v"
CACHE = ", float[B,1,1,T] m, float[B,2,P,4] pk, float[B,2,P,4] pv"


def view(inputs: str, attributes: str = "", more: str = "", outputs: str = "y") -> AttentionOp:
    text = f"main ({QKV}{inputs}) => (float[B,S,8] y) {{ {outputs} = Attention <q_num_heads = 2,"
    return AttentionOp.of(
        only(program(f"{text} kv_num_heads = 2{attributes}> (q, k, v{more}) }}"), "Attention")
    )


def test_what_is_absent_has_the_schemas_default() -> None:
    op = view("")

    assert (op.mask, op.past, op.presents, op.nonpad_kv_seqlen, op.qk) == (None,) * 5
    assert (op.scale, op.causal, op.window, op.softcap) == (None, False, (-1, -1), 0.0)
    assert not op.placed
    assert op.scaling(4) == 0.5


def test_operands_and_outputs_are_known_by_name() -> None:
    op = view(CACHE, more=", m, pk, pv", outputs="y, a, b, c")

    assert [value.name for value in op.qkv] == ["q", "k", "v"]
    assert op.mask is not None
    assert op.mask.name == "m"
    assert op.past is not None
    assert [value.name for value in op.past] == ["pk", "pv"]
    assert op.presents is not None
    assert [value.name for value in op.presents] == ["a", "b"]
    assert op.qk is not None
    assert op.qk.name == "c"


@pytest.mark.parametrize(
    ("attributes", "placed"),
    [
        (", is_causal = 1", True),
        (", left_window_size = 0", True),
        (", right_window_size = 3", True),
        (", softcap = 2.0, scale = 0.0", False),
    ],
)
def test_attributes_are_written_as_they_were_read(attributes: str, *, placed: bool) -> None:
    op = view("", attributes)
    node = op.y.producer()
    assert node is not None

    assert op.placed == placed
    assert op.written() == {name: attr.value for name, attr in node.attributes.items()}
    assert AttentionAttributes.of(node).written() == op.written()


def test_no_scale_is_not_a_scale_of_nothing() -> None:
    assert view("", ", scale = 0.0").scaling(4) == 0.0


def test_attributes_that_are_kept_are_those_that_are_there() -> None:
    node = view("", ", softcap = 2.0, left_window_size = -1").y.producer()
    assert node is not None

    assert kept(node, "window", "scale", "softcap") == {"softcap": 2.0, "left_window_size": -1}
