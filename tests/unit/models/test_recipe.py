"""A recipe makes a parameter of a stored tensor, and knows its shape beforehand."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmopt.models import ParameterRecipe

STORED = np.arange(12, dtype=np.float16).reshape(4, 3)


def read(name: str) -> np.ndarray[Any, Any]:
    assert name == "stored"
    return STORED.copy()


@pytest.mark.parametrize(
    ("recipe", "want"),
    [
        pytest.param(ParameterRecipe(("stored",)), STORED, id="copy"),
        pytest.param(ParameterRecipe(("stored",), rows=(1, 3)), STORED[1:3], id="rows"),
        pytest.param(ParameterRecipe(("stored",), "transpose"), STORED.T, id="transpose"),
        pytest.param(
            ParameterRecipe(("stored",), "transpose", (0, 2)), STORED.T[:2], id="rows of it"
        ),
    ],
)
def test_the_numbers_shape_and_dtype(recipe: ParameterRecipe, want: np.ndarray[Any, Any]) -> None:
    made = recipe.apply(read)

    np.testing.assert_array_equal(made, want)
    assert made.dtype == STORED.dtype
    assert recipe.shape(lambda _: STORED.shape) == want.shape


def test_one_is_added_in_float32_where_bfloat16_would_round_it_away() -> None:
    stored = np.array([2.0**-9, -0.5], dtype=ml_dtypes.bfloat16)

    made = ParameterRecipe(("w",), "add-one").apply(lambda _: stored)

    assert made.dtype == np.float32
    assert made.tolist() == [1 + 2.0**-9, 0.5]


def test_rows_past_the_end_show_in_the_shape() -> None:
    assert ParameterRecipe(("w",), rows=(2, 9)).shape(lambda _: (4, 3)) == (2, 3)
    assert ParameterRecipe(("w",), rows=(6, 9)).shape(lambda _: (4, 3)) == (0, 3)


def test_a_scalar_has_no_rows() -> None:
    assert ParameterRecipe(("w",), rows=(0, 2)).shape(lambda _: ()) == ()
