"""Mixtures of experts run as one operator and compute what was written out."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx_ir as ir
import pytest
from support.mixtures import EXPERTS, SHARES, WEIGHED, every_expert, mixture, tokens
from support.programs import error_rel, evaluate, only, operators, reasons, run

from llmopt.backends import find_backend
from llmopt.backends.onnxruntime import finish
from llmopt.backends.onnxruntime.lower_experts import LowerExperts
from llmopt.backends.onnxruntime.session import open_session
from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes.pipeline import Pipeline, Ran
from llmopt.passes.quantize_experts import QuantizeExperts
from llmopt.passes.quantize_weights import QuantizeWeights
from llmopt.quantization.schemes import Blockwise, DynamicInt8

TOLERANCE: Final = 1e-5  # float32, max|a-b| / max|b|
IN_INT8: Final = 0.03  # rows of 32 and more numbers, rounded to int8


def lowered(made: Program, accuracy_level: int = 0) -> Program:
    result = Pipeline((LowerExperts(accuracy_level),)).run(made.clone())
    finish(result.model)
    return result


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("count", [1, 9])
def test_one_operator_computes_the_mixture(shares: str, count: int) -> None:
    made = mixture(SHARES[shares])

    low = lowered(made)

    assert operators(low) == ["MatMul", "MoE"]
    want = evaluate(made, tokens(count))["y"]
    assert error_rel(run(low, tokens(count))["y"], want) < TOLERANCE


@pytest.mark.parametrize("shares", WEIGHED)
def test_experts_that_are_all_computed_become_one_operator(shares: str) -> None:
    made, given = every_expert(shares), {"x": tokens(6)["x"].reshape(2, 3, -1)}

    low = lowered(made)

    assert operators(low) == ["MatMul", "Reshape", "MoE"]
    assert error_rel(run(low, given)["y"], evaluate(made, given)["y"]) < TOLERANCE


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_of_each_expert_are_put_together(*, symmetric: bool) -> None:
    made, given = every_expert("compared"), {"x": tokens(6)["x"].reshape(2, 3, -1)}
    made = Pipeline((QuantizeWeights(4, 16, symmetric),)).run(made)
    assert operators(made).count("DequantizeLinear") == 2 * EXPERTS

    low = lowered(made)

    assert operators(low) == ["MatMul", "Reshape", "QMoE"]
    assert error_rel(run(low, given)["y"], evaluate(made, given)["y"]) < TOLERANCE


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (8, 32), (8, 64)])
def test_codes_are_multiplied_as_they_are_stored(bits: int, block: int, *, symmetric: bool) -> None:
    made = Pipeline((QuantizeExperts(bits, block, symmetric),)).run(mixture())

    low = lowered(made)

    assert operators(low) == ["MatMul", "QMoE"]
    node = only(low, "QMoE")
    assert g.attribute(node, "expert_weight_bits", 0) == bits
    got, want = run(low, tokens())["y"], evaluate(made, tokens())["y"]
    assert error_rel(got, want) < (TOLERANCE if bits == 4 else IN_INT8)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_proof_multiplies_codes_in_float32(bits: int, tmp_path: Path) -> None:
    made = Pipeline((QuantizeExperts(bits, 16),)).run(mixture())
    low, path = lowered(made, accuracy_level=4), tmp_path / "model.onnx"
    path.write_bytes(ir.to_proto(low.model).SerializeToString())

    errors = [
        error_rel(open_session(path, exact=exact)(tokens())["y"], evaluate(made, tokens())["y"])
        for exact in (True, False)
    ]

    assert errors[0] < TOLERANCE < 1e-3 < errors[1] < IN_INT8


def test_what_is_another_thing_is_computed_as_written() -> None:
    made, ran = mixture({"Swish (gate)": "Relu (gate)"}), list[Ran]()

    low = Pipeline((LowerExperts(),)).run(made.clone(), lambda *step: ran.append(step[2]))
    finish(low.model)

    assert "MoE" not in operators(low)
    ((miss,),) = (each.missed for each in ran)
    assert miss.node == "top"
    assert "not Swish(gate) * up" in miss.reason
    assert error_rel(run(low, tokens())["y"], evaluate(made, tokens())["y"]) < TOLERANCE


def test_the_backend_rounds_experts_where_it_rounds_weights() -> None:
    names = [each.name for each in find_backend("cpu").passes(Blockwise(4, 64))]
    assert names[:3] == ["quantize-experts", "lower-experts", "lower-weights"]
    assert find_backend("cpu").passes(Blockwise(4, 64))[0] == QuantizeExperts(4, 64)
    assert find_backend("cpu").passes(None)[0] == LowerExperts()
    assert find_backend("cpu").passes(DynamicInt8())[0] == LowerExperts()
    assert reasons(LowerExperts().run(mixture())) == ""
