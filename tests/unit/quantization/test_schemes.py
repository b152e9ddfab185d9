"""Schemes: their text, and what is refused."""

import pytest

from llmopt.errors import UnknownNameError, UsageError
from llmopt.quantization import packing
from llmopt.quantization.schemes import (
    SCHEMES,
    Blockwise,
    Cast,
    DynamicInt8,
    Scheme,
    parse_scheme,
)


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("w8", Blockwise(8, 32)),
        ("w6", Blockwise(6, 32)),
        ("w4", Blockwise(4, 32)),
        ("w4{head=6}", Blockwise(4, 32, head=6)),
        (" w4{} ", Blockwise(4, 32)),
        ("w4{block=64,symmetric=false}", Blockwise(4, 64, symmetric=False)),
        ("w8{ symmetric = true , block = 256 }", Blockwise(8, 256)),
        ("w8a8-dynamic", DynamicInt8()),
        ("fp16", Cast("float16")),
        ("bf16", Cast("bfloat16")),
    ],
)
def test_text_names_a_scheme_and_a_scheme_spells_itself(text: str, scheme: Scheme) -> None:
    assert parse_scheme(text) == scheme
    assert parse_scheme(str(scheme)) == scheme


def test_every_scheme_has_a_line_and_a_value() -> None:
    for name, line in SCHEMES.items():
        assert str(parse_scheme(name)) == name
        assert line.strip()
        assert "\n" not in line


@pytest.mark.parametrize("text", ["w5", "W4", "", "w", "int4", "w2"])
def test_an_unknown_scheme_is_named_with_those_known(text: str) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown scheme .*w8a8-dynamic") as caught:
        parse_scheme(text or "nothing")
    assert caught.value.exit_code == 2


def test_an_unknown_option_is_named_with_those_known() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'block'.*symmetric"):
        parse_scheme("w4{blocks=32}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("w4+kv8", "not possible yet"),
        ("w4{block=48}", "choose one of 16, 32, 64, 128, 256"),
        ("w4{block=1000000000000}", "choose one of"),
        ("w4{block=-32}", "choose one of"),
        ("w4{block}", "has no value"),
        ("w4{symmetric=no}", "true or false"),
        ("w4{block=32", "is not a scheme"),
        ("w4}block=32{", "is not a scheme"),
        ("", "is not a scheme"),
        ("fp16{block=32}", "unknown option of scheme fp16 'block'; none is known"),
        ("w8a8-dynamic{block=32}", "none is known"),
    ],
)
def test_a_bad_request_is_refused_in_words(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_scheme(text)


@pytest.mark.parametrize(("bits", "block"), [(3, 32), (16, 32), (4, 8), (4, 512), (8, 0)])
def test_what_no_kernel_has_is_refused(bits: int, block: int) -> None:
    with pytest.raises(UsageError):
        Blockwise(bits, block)


def test_sizes_are_those_of_the_stored_arrays() -> None:
    for scheme in (
        Blockwise(4, 16),
        Blockwise(4, 32, symmetric=False),
        Blockwise(6, 16, symmetric=False),
        Blockwise(8, 64, symmetric=False),
    ):
        like = packing.empty(7, 100, scheme)
        stored = like.data.nbytes + like.scale.nbytes
        stored += 0 if like.zero_point is None else like.zero_point.nbytes
        assert scheme.size_bytes(7, 100, scale_bytes=4) == stored
    assert DynamicInt8().size_bytes(3, 5) == 3 * 5 + 4 * 5
