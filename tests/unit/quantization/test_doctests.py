"""Every number in a docstring of llmopt.quantization is one that was run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name", ["schemes", "numerics", "packing", "dynamic", "plan", "evaluation"]
)
def test_docstrings_say_what_happens(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"llmopt.quantization.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
