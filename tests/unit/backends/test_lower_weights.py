"""Quantized weights run as their own kernels, stored once, and compute what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from support.programs import apply, bound, error_rel, evaluate, inputs, open_session, operators, run

from llmopt.backends import find_backend
from llmopt.backends.base import Demand
from llmopt.backends.onnxruntime import DATA, ENTRY, finish
from llmopt.backends.onnxruntime.lower_weights import LowerWeights
from llmopt.ir.feeds import Case
from llmopt.ir.program import Program
from llmopt.passes.pipeline import Pipeline
from llmopt.passes.quantize_weights import QuantizeWeights
from llmopt.quantization.schemes import Blockwise

TOLERANCE: Final = 1e-5  # float32, max|a-b| / max|b|
TIED: Final = """main (int64[B,S] input_ids, float[{n},{k}] e) => (float[B,S,{n}] logits) {{
   x = Gather (e, input_ids)
   t = Transpose <perm = [1, 0]> (e)
   logits = MatMul (x, t)
}}"""
BIASED: Final = """main (float[B,S,{k}] x, float[{k},{n}] w, float[{n}] b, float[1] c)
=> (float[B,S,{n}] y, float[B,S,{n}] z) {{
   p = MatMul (x, w)
   y = Add (b, p)
   q = MatMul (x, w)
   z = Add (q, c)
}}"""


def random(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def quantized(made: Program, scheme: Blockwise) -> Program:
    apply("fold-weights", made)
    return Pipeline((QuantizeWeights(scheme.bits, scheme.block, scheme.symmetric),)).run(made)


def lowered(made: Program) -> Program:
    result = Pipeline((LowerWeights(accuracy_level=0),)).run(made.clone())
    finish(result.model)
    return result


SCHEMES: Final = [
    pytest.param(Blockwise(4, 32, symmetric=True), id="w4"),
    pytest.param(Blockwise(4, 16, symmetric=False), id="w4 asymmetric"),
    pytest.param(Blockwise(8, 32, symmetric=True), id="w8"),
    pytest.param(Blockwise(8, 64, symmetric=False), id="w8 asymmetric"),
]


@pytest.mark.parametrize("columns", [64, 40])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_embedding_and_the_head_tied_to_it_share_their_codes(
    scheme: Blockwise, columns: int
) -> None:
    made = bound(TIED.format(n=37, k=columns), {"e": random(37, columns)})
    made = quantized(made, scheme)
    assert operators(made).count("DequantizeLinear") == 1
    given = inputs(made, Case(2, 5), 37)

    low = lowered(made)

    ops = operators(low)
    assert "MatMulNBits" in ops
    assert "GatherBlockQuantized" in ops
    assert "DequantizeLinear" not in ops
    codes = [n for n in low.graph.initializers if n.endswith((".bytes", ".codes", ".table"))]
    assert len(codes) == 1
    assert error_rel(run(low, given)["logits"], evaluate(made, given)["logits"]) < TOLERANCE


@pytest.mark.parametrize("columns", [64, 40])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_bias_goes_into_the_product_if_it_is_one_number_per_output(
    scheme: Blockwise, columns: int
) -> None:
    arrays = {"w": random(columns, 24), "b": random(24), "c": random(1)}
    made = quantized(bound(BIASED.format(n=24, k=columns), arrays), scheme)
    given = inputs(made, Case(2, 5))

    low = lowered(made)

    assert sorted(operators(low)) == ["Add", "MatMulNBits", "MatMulNBits"]
    want, got = evaluate(made, given), run(low, given)
    assert max(error_rel(got[name], want[name]) for name in want) < TOLERANCE


def test_a_tied_weight_is_written_once(tmp_path: Path) -> None:
    sizes = {}
    for label, scheme in (("float", None), ("w8", Blockwise(8, 32, symmetric=True))):
        made = bound(TIED.format(n=512, k=64), {"e": random(512, 64)})
        if scheme is not None:
            made = quantized(made, scheme)
        else:
            apply("fold-weights", made)
        before = made.clone()
        low = Pipeline((LowerWeights(accuracy_level=0),)).run(made)
        folder = tmp_path / label
        folder.mkdir()
        find_backend("cpu").write(low, folder, Demand())
        sizes[label] = sum(file.stat().st_size for file in folder.glob(f"{ENTRY}*"))
        given = inputs(before, Case(2, 3), 512)
        got, want = open_session(folder / ENTRY, given), evaluate(before, given)
        assert error_rel(got["logits"], want["logits"]) < TOLERANCE
        assert (folder / DATA).exists()

    numbers = 512 * 64
    assert numbers * 4 <= sizes["float"] < numbers * 5
    assert numbers <= sizes["w8"] < numbers * 2


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for label in "ab":
        made = quantized(
            bound(TIED.format(n=40, k=32), {"e": random(40, 32)}), Blockwise(4, 32, symmetric=True)
        )
        folder = tmp_path / label
        folder.mkdir()
        find_backend("cpu").write(Pipeline((LowerWeights(),)).run(made), folder, Demand())
        contents.append([(folder / name).read_bytes() for name in (ENTRY, DATA)])

    assert contents[0] == contents[1]


def test_codes_from_elsewhere_stay_with_a_reason() -> None:
    made = bound(
        """main (float[B,S,32] x, uint8[8,32] codes, float[8,1] scale) => (float[B,S,8] y) {
        w = DequantizeLinear <axis = 1, block_size = 32> (codes, scale)
        t = Transpose <perm = [1, 0]> (w)
        y = MatMul (x, t)
    }""",
        {"codes": np.ones((8, 32), np.uint8), "scale": random(8, 1)},
    )

    outcome = LowerWeights().run(made)

    assert outcome.applied == 0
    assert "were not made by quantize-weights" in outcome.missed[0].reason


def test_narrow_and_computed_weights_are_not_quantized() -> None:
    made = bound(
        """main (float[B,S,8] x, float[8,24] w, float[24,24] v)
    => (float[B,S,24] y, float[B,S,24] z)
    {
        y = MatMul (x, w)
        z = MatMul (y, v)
    }""",
        {"w": random(8, 24)},
    )

    outcome = QuantizeWeights().run(made)

    assert outcome.applied == 0
    assert [miss.reason for miss in outcome.missed] == ["its weight has 8 inputs, fewer than 16"]
