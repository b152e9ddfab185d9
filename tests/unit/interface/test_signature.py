"""What a signature says of caches: which inputs and outputs they are, and what empty ones are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmopt.errors import LlmoptError, UsageError
from llmopt.interface.signature import Port, Role, Signature

TOKENS = Port("input_ids", Role.TOKENS, "int64", ("B", "S"))
LOGITS = Port("logits", Role.LOGITS, "float32", ("B", "K", "V"))
PASTS = tuple(
    Port(f"past.{layer}.{role}", role, "float16", ("B", 2, "P", 8), layer)
    for layer in (0, 1)
    for role in (Role.PAST_KEY, Role.PAST_VALUE)
)
PRESENTS = tuple(
    Port(f"present.{layer}.{role}", role, "float16", ("B", 2, "T", 8), layer)
    for role in (Role.PRESENT_VALUE, Role.PRESENT_KEY)
    for layer in (1, 0)
)
SIGNATURE = Signature((TOKENS, *PASTS), (*PRESENTS, LOGITS))


def test_each_past_is_paired_with_its_present_in_whatever_order_they_come_out() -> None:
    assert SIGNATURE.pasts == PASTS
    assert [port.name for port in SIGNATURE.presents] == [
        "present.0.present_key",
        "present.0.present_value",
        "present.1.present_key",
        "present.1.present_value",
    ]
    assert SIGNATURE.cache_pairs() == list(zip(PASTS, SIGNATURE.presents, strict=True))


def test_empty_caches_have_no_tokens_and_the_dtype_of_their_inputs() -> None:
    caches = SIGNATURE.empty_caches(3)

    assert list(caches) == [port.name for port in PASTS]
    assert {(array.shape, array.dtype) for array in caches.values()} == {
        ((3, 2, 0, 8), np.dtype(np.float16))
    }


def test_without_a_cache_there_is_nothing_to_pair() -> None:
    plain = Signature((TOKENS,), (LOGITS,))

    assert not plain.has_cache
    assert plain.cache_pairs() == []
    assert plain.empty_caches(2) == {}


def test_a_fixed_dimension_of_a_cache_is_left_as_it_is() -> None:
    fixed = replace(PASTS[0], shape=("B", 2, 16, 8))

    assert PASTS[0].cache_shape(3, 5) == (3, 2, 5, 8)
    assert fixed.cache_shape(3, 5) == (3, 2, 16, 8)


def test_a_cache_of_free_heads_is_refused() -> None:
    free = replace(PASTS[0], shape=("B", "G", "P", 8))

    with pytest.raises(UsageError, match=r"past.0.past_key: .* leaves heads or width"):
        free.cache_shape(1, 0)


def test_a_role_that_is_needed_and_missing_is_named() -> None:
    assert SIGNATURE.need(Role.LOGITS) is LOGITS
    with pytest.raises(LlmoptError, match="no 'mask' input or output"):
        SIGNATURE.need(Role.MASK)
