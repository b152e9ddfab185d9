"""Shares, sizes and durations as text: ``5%``, ``120MB``, ``15ms``."""

from __future__ import annotations

import re
from typing import Final

from llmopt.errors import UsageError

_UNITS: Final = {
    "": 1.0,
    "%": 0.01,
    "s": 1.0,
    "ms": 1e-3,
    "us": 1e-6,
    "bytes": 1.0,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "kib": 2.0**10,
    "mib": 2.0**20,
    "gib": 2.0**30,
}
_FORM: Final = re.compile(r"\s*(\d+(?:\.\d*)?(?:e-?\d+)?)\s*([a-z%]*)\s*", re.IGNORECASE)


def amount(text: object, option: str) -> float:
    """Return the number that ``text`` spells, in seconds, bytes or as a share.

    Args:
        text: A number, or text of a number and a unit.
        option: Name of the option, for messages.

    Raises:
        UsageError: The text is not an amount, or negative.

    >>> amount("5%", ""), amount("120 MB", ""), amount("15ms", ""), amount(0.25, "")
    (0.05, 120000000.0, 0.015, 0.25)
    """
    if isinstance(text, int | float) and not isinstance(text, bool) and text >= 0:
        return float(text)
    match = _FORM.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(f"{option}: {text!r} is not an amount; write 5%, 15ms, 120MB or a number")
    return float(match[1]) * _UNITS[match[2].lower()]


def spell(metric: str, value: float | None) -> str:
    """Return a value of a metric with its unit.

    >>> spell("ttft_s", 0.1234), spell("size_bytes", 90_450_000), spell("operators", 326)
    ('123 ms', '90.5 MB', '326')
    >>> spell("flops_per_token", 268_000_000), spell("kl_mean", 0.348), spell("x", None)
    ('268 M', '0.348', '-')
    """
    if value is None:
        return "-"
    if metric == "load_s" or (metric.endswith("_s") and value >= 10):
        return f"{value:.3g} s"
    if metric.endswith("_s"):
        return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"
    if "bytes" in metric:
        return _scaled(value, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), " bytes")
    if "flops" in metric:
        return _scaled(value, (("G", 1e9), ("M", 1e6), ("k", 1e3)), "")
    return f"{value:.0f}" if value == int(value) else f"{value:.3g}"


def percent(share: float, *, signed: bool = False) -> str:
    """Return a share as a percentage.

    >>> percent(0.05), percent(0.0123, signed=True), percent(-0.5, signed=True)
    ('5 %', '+1.2 %', '-50 %')
    """
    value = share * 100
    decimals = 0 if abs(value) >= 99.5 else 1
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    if float(text) == 0:
        return (
            "0 %" if value == 0 else f"{'<' if value > 0 else '>'} {'-' if value < 0 else ''}0.1 %"
        )
    return text.removesuffix(".0") + " %"


def _scaled(value: float, units: tuple[tuple[str, float], ...], plain: str) -> str:
    for unit, factor in units:
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f}{plain}"
