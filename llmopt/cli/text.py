"""Formatting of numbers, sizes and tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import click

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def echo_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def size(size_bytes: float) -> str:
    """Return a size with three digits and a decimal unit.

    >>> size(143_213_345), size(999), size(2.5e9)
    ('143 MB', '999 bytes', '2.50 GB')
    """
    for unit, factor in _UNITS:
        if size_bytes >= factor:
            return f"{digits(size_bytes / factor)} {unit}"
    return f"{size_bytes:.0f} bytes"


def digits(value: float, count: int = 3) -> str:
    """Return a number rounded to some digits, never with an exponent.

    >>> digits(1234.5), digits(12.345), digits(0.00123456)
    ('1234', '12.3', '0.00123')
    """
    if value == 0 or abs(value) >= 10**count:
        return f"{value:.0f}"
    return f"{Decimal(f'{value:.{count - 1}e}'):f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows in aligned columns, numbers to the right.

    >>> print(table(["kind", "fused"], [["attention", "30"], ["norm", "61"]]))
    kind       fused
    attention     30
    norm          61
    """
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [bool(rows) and all(_numeric(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _numeric(cell: str) -> bool:
    return cell[:1].isdigit() or cell in {"", "-", "?"}


def fields(pairs: Sequence[tuple[str, str]]) -> str:
    """Return ``name  value`` lines with aligned values.

    >>> print(fields([("task", "embed"), ("target", "onnxruntime-cpu")]))
    task    embed
    target  onnxruntime-cpu
    """
    width = max((len(name) for name, _ in pairs), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in pairs)
