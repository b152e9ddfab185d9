"""Schemes by their text, where a test may name none."""

from __future__ import annotations

from llmopt.quantization.schemes import Scheme, parse_scheme


def scheme_of(text: str | None) -> Scheme | None:
    """Return the scheme that ``text`` names; None, which keeps float32, for None."""
    return None if text is None else parse_scheme(text)
