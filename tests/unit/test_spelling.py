"""One spelling: text is split, read by types, and written again with what differs from defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from llmopt import spelling
from llmopt.errors import UnknownNameError, UsageError
from llmopt.passes.quantize_experts import QuantizeExperts
from llmopt.passes.quantize_weights import QuantizeWeights
from llmopt.quantization.schemes import Blockwise, parse_scheme


@dataclass(frozen=True)
class Sized:
    """Something with a size.

    Args:
        size: The size,
            in bytes.
        form: The form.
    """

    name: ClassVar[str] = "sized"
    size: int = 1
    form: Literal["round", "flat"] = "round"


@dataclass(frozen=True)
class Weighted(Sized):
    """Something with a weight too.

    Args:
        form: The form that weighs.
        weight: The weight.
    """

    name: ClassVar[str] = "weighted"
    weight: float | None = None


def test_options_of_bases_come_first_with_the_text_nearest_to_the_class() -> None:
    texts = {option.name: option.text for option in spelling.options_of(Weighted)}

    assert texts == {
        "size": "The size, in bytes.",
        "form": "The form that weighs.",
        "weight": "The weight.",
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", Weighted()),
        ("size=2", Weighted(2)),
        ("form=flat,weight=0.5", Weighted(form="flat", weight=0.5)),
    ],
)
def test_what_is_read_is_spelled_the_same(text: str, value: Weighted) -> None:
    assert spelling.make(Weighted, text, "thing weighted") == value
    assert spelling.spell(value) == (f"weighted{{{text}}}" if text else "weighted")


def test_a_field_that_the_name_stands_for_is_not_spelled() -> None:
    assert spelling.spell(Weighted(2, "flat"), {"size"}) == "weighted{form=flat}"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("sise=2", UnknownNameError, "option of thing weighted 'sise'; did you mean 'size'"),
        ("size=x", UsageError, "size='x' of thing weighted: expected int; look there"),
        ("weight=x", UsageError, "expected float or none"),
        ("form=square", UsageError, "expected round or flat"),
        ("size", UsageError, "size of thing weighted has no value: write size=VALUE once"),
        ("size=1,size=2", UsageError, "is given twice"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    text: str, error: type[UsageError], message: str
) -> None:
    with pytest.raises(error) as refused:
        spelling.make(Weighted, text, "thing weighted", "look there")

    assert message in str(refused.value)


@pytest.mark.parametrize("text", ["", "-a", "a{", "a}", "a{b=1}c", "a b", "{b=1}"])
def test_text_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a thing: write name or name"):
        spelling.split(text, "thing")


def test_passes_round_to_the_codes_of_a_scheme() -> None:
    scheme = parse_scheme("w8{block=64,scale=float16}")
    assert isinstance(scheme, Blockwise)

    weights = QuantizeWeights(**scheme.codes, head=4)
    assert spelling.spell(weights) == "quantize-weights{bits=8,block=64,scale=float16,head=4}"
    experts = QuantizeExperts.of(scheme)
    assert spelling.spell(experts) == "quantize-experts{bits=8,block=64,scale=float16}"
    assert all(option.text for option in spelling.options_of(QuantizeExperts))
    with pytest.raises(UsageError, match="block=48"):
        QuantizeWeights(block=48)
