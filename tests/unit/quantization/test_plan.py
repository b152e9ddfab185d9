"""Precision plans as values and as JSON."""

import pytest

from llmopt.errors import UnknownNameError, UsageError
from llmopt.quantization.plan import PrecisionPlan
from llmopt.quantization.schemes import Blockwise


def test_a_plan_survives_its_json() -> None:
    plan = PrecisionPlan({"b": "w4{block=64}", "a": "w8{symmetric=false}", "ç": "fp16"})
    assert PrecisionPlan.from_json(plan.to_json()) == plan
    assert plan.to_json() == '{"a": "w8{symmetric=false}", "b": "w4{block=64}", "ç": "fp16"}'


def test_order_and_spelling_do_not_matter() -> None:
    one = PrecisionPlan({"b": "w4", "a": "w8"})
    other = PrecisionPlan({"a": "w8{block=32}", "b": "w4{symmetric=true}"})
    assert one == other
    assert hash(one) == hash(other)
    assert one.to_json() == other.to_json()


def test_a_uniform_plan_takes_overrides() -> None:
    plan = PrecisionPlan.uniform(
        ["q", "head"], Blockwise(4, 64), overrides={"head": "w8", "absent": "w8"}
    )
    assert list(plan) == ["head", "q"]
    assert len(plan) == 2
    assert plan.scheme("q") == Blockwise(4, 64)
    assert plan.scheme("head") == Blockwise(8)
    assert plan.scheme("absent") is None


def test_a_plan_cannot_be_changed() -> None:
    source = {"a": "w4"}
    plan = PrecisionPlan(source)
    source["a"] = "w8"
    assert plan.schemes["a"] == "w4"
    with pytest.raises(TypeError):
        plan.schemes["a"] = "w8"  # type: ignore[index]


def test_unknown_schemes_are_refused() -> None:
    with pytest.raises(UnknownNameError):
        PrecisionPlan({"a": "w5"})


@pytest.mark.parametrize("text", ["", "[]", '{"a": 4}', "{", '"w4"'])
def test_json_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="precision plan"):
        PrecisionPlan.from_json(text)
