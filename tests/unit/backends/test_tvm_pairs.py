"""Rotation of neighbours becomes one of halves, bit for bit."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir
from support.programs import evaluate, inputs, only, program

from llmopt.backends.tvm.separate_pairs import SeparatePairs
from llmopt.ir import graph as g
from llmopt.ir.feeds import Case

NEIGHBOURS: Final = """main (float[B,S,16] x, int64[B,S] position_ids) => (float[B,S,16] y)
<float[9,4] cos = {%s}, float[9,4] sin = {%s}>
{
   y = RotaryEmbedding <num_heads = 2, interleaved = 1> (x, cos, sin, position_ids)
}""" % tuple(",".join(f"{f(i):.6f}" for i in range(36)) for f in (np.cos, np.sin))  # noqa: UP031


def test_neighbours_are_put_apart_and_back() -> None:
    made = program(NEIGHBOURS)
    before = made.clone()

    assert SeparatePairs().run(made).applied == 1

    assert not g.attribute(only(made, "RotaryEmbedding"), "interleaved", 0)
    given = inputs(before, Case(3, 7, 0, "left"))
    np.testing.assert_array_equal(evaluate(made, given)["y"], evaluate(before, given)["y"])
    assert SeparatePairs().run(made).applied == 0


def test_heads_that_do_not_divide_the_width_stay_with_a_reason() -> None:
    made = program(NEIGHBOURS)
    only(made, "RotaryEmbedding").attributes.add(ir.AttrInt64("num_heads", 3))

    outcome = SeparatePairs().run(made)

    assert outcome.applied == 0
    assert "3 heads" in outcome.missed[0].reason
