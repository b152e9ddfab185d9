"""Mixtures of experts: found as they are exported, and what is another thing is said to be one."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir
import pytest
from support.mixtures import (
    EXPERTS,
    INNER,
    SHARES,
    WEIGHED,
    WIDE,
    every_expert,
    mixture,
    random_weights,
    tokens,
)
from support.programs import apply, error_rel, evaluate, only, operators, reasons

from llmopt.ir import graph as g
from llmopt.passes.experts import Experts, find_experts, routers
from llmopt.passes.quantize_weights import candidates
from llmopt.quantization.numerics import fake_quantize
from llmopt.quantization.schemes import Blockwise


@pytest.mark.parametrize("shares", SHARES)
def test_a_mixture_is_found_with_its_sizes_and_weights(shares: str) -> None:
    made = mixture(SHARES[shares])

    ((topk, found),) = find_experts(made)

    assert isinstance(found, Experts)
    assert topk is only(made, "TopK")
    assert (found.k, found.normalized) == (2, shares != "as they are")
    assert (found.x.name, found.logits.name, found.result.name) == ("x", "logits", "y")
    assert [g.shape(v) for v in found.gate_up] == [[EXPERTS, 2 * INNER, WIDE]]
    assert [g.shape(v) for v in found.down] == [[EXPERTS, WIDE, INNER]]
    assert {node.outputs[0].name for node in routers(made)} == {"logits"}


ELSE: Final = {
    "the mean": ("ReduceSum <keepdims = 0>", "ReduceMean <keepdims = 0>", "is not summed"),
    "another activation": ("Swish (gate)", "Relu (gate)", "not Swish"),
    "another slope": ("Swish (gate)", "Swish <alpha = 1.7> (gate)", "not Swish"),
    "halves changed": ("Mul (bent, up)", "Mul (bent, gate)", "are not gate and up"),
    "no gate": ("Mul (bent, up)", "Add (bent, up)", "not Swish"),
    "the smallest": ("TopK <axis = -1>", "TopK <axis = -1, largest = 0>", "largest"),
    "no softmax": ("Softmax <axis = -1> (logits)", "Sigmoid (logits)", "no softmax"),
    "of other experts": (
        "down_of = GatherND (down, index)",
        "other = Abs (index)\n   down_of = GatherND (down, other)",
        "by something other",
    ),
    "not divided": ("Div (top, total)", "Mul (top, total)", "not their sum"),
    "not by the sum": ("Div (top, total)", "Div (total, top)", "not their sum"),
    "other rows": (
        "column = Unsqueeze (repeated, last)",
        "turned = Neg (repeated)\n   column = Unsqueeze (turned, last)",
        "is not each token's row",
    ),
    "two products": (
        "each = Squeeze (product2, last)",
        "each2 = Squeeze (product2, last)\n   each = Neg (each2)",
        "no product of a row",
    ),
    "weights that are computed": (
        "column2 = Unsqueeze (gated, last)",
        "more = Abs (gated)\n   column2 = Unsqueeze (more, last)",
        "not Swish",
    ),
}


@pytest.mark.parametrize("name", ELSE)
def test_what_is_another_thing_is_named(name: str) -> None:
    line, instead, reason = ELSE[name]

    ((_, found),) = find_experts(mixture({line: instead}))

    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize("shares", WEIGHED)
def test_experts_that_are_all_computed_are_found_one_by_one(shares: str) -> None:
    made = every_expert(shares)

    ((topk, found),) = find_experts(made)

    assert isinstance(found, Experts), found
    assert topk is only(made, "TopK")
    assert (found.k, found.normalized) == (2, True)
    assert (found.x.name, found.logits.name, found.result.name) == ("x", "logits", "y")
    assert [v.name for v in found.gate_up] == [f"gate_up{i}" for i in range(EXPERTS)]
    assert [v.name for v in found.down] == [f"down{i}" for i in range(EXPERTS)]
    assert {node.outputs[0].name for node in routers(made)} == {"logits"}


EVERY_ELSE: Final = {
    "an expert left out": ("sum3 = Add (sum2, weighed3)", "sum3 = Identity (sum2)", "not all of 5"),
    "a square added": (
        "sum3 = Add (sum2, weighed3)",
        "square = Mul (weighed3, weighed3)\n   sum3 = Add (sum2, square)",
        "is not added to what the other experts give",
    ),
    "one more added": (
        "sum3 = Add (sum2, weighed3)",
        "more = Add (x, weighed3)\n   sum3 = Add (sum2, more)",
        "'x' is added among what the experts give",
    ),
    "weighed twice": ("Equal (chosen, n1)", "Equal (chosen, n0)", "not all of 5"),
    "another input": (
        "h2 = MatMul (x, gate_up2)",
        "x2 = Neg (x)\n   h2 = MatMul (x2, gate_up2)",
        "expert 2 reads 'x2', the others 'x'",
    ),
    "another activation": ("bent4 = Swish (gate4)", "bent4 = Relu (gate4)", "not Swish"),
    "other choices": (
        "kept1 = Mul (share, as1)",
        "kept1 = Mul (chances2, as1)",
        "does not pick the share of expert 1",
    ),
}


@pytest.mark.parametrize("name", EVERY_ELSE)
def test_what_weighs_other_things_is_named(name: str) -> None:
    line, instead, reason = EVERY_ELSE[name]

    ((_, found),) = find_experts(every_expert("compared", {line: instead}))

    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_of_experts_are_rounded_row_by_row(bits: int, *, symmetric: bool) -> None:
    made = mixture()
    before = mixture()
    options = f"bits={bits},block=32,symmetric={str(symmetric).lower()}"

    outcome = apply(f"quantize-experts{{{options}}}", made)

    assert (outcome.applied, reasons(outcome)) == (2, "")
    assert operators(made).count("DequantizeLinear") == 2
    scheme = Blockwise(bits, 32, symmetric)
    for name in ("gate_up", "down"):
        value = before.graph.initializers[name]
        array = random_weights()[name]
        rows = fake_quantize(array.reshape(-1, array.shape[-1]), scheme, None)
        value.const_value = ir.tensor(rows.reshape(array.shape))
    got, want = evaluate(made, tokens())["y"], evaluate(before, tokens())["y"]
    assert error_rel(got, want) < 1e-6
    assert np.abs(got - evaluate(mixture(), tokens())["y"]).max() > 1e-4
    assert apply(f"quantize-experts{{{options}}}", made).applied == 0


def test_what_chooses_is_not_rounded() -> None:
    assert [node.name for node, _, _ in candidates(mixture())] == []
