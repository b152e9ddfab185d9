"""Sizes of axes as products of numbers and symbols: ``"4*B"`` is four times the batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import onnx_ir as ir

from llmopt.ir import graph as g


def factors(size: g.Dim) -> tuple[int, list[str]]:
    """Return the number and the symbols that a size is the product of.

    >>> factors("4*B*S")
    (4, ['B', 'S'])
    """
    if isinstance(size, int):
        return size, []
    parts = [text.strip() for text in size.split("*")]
    if not all(part.isalnum() for part in parts):
        return 1, [size]  # not a product: a size that nobody could tell
    return (
        math.prod(int(part) for part in parts if part.isdigit()),
        [part for part in parts if not part.isdigit()],
    )


def quotient(size: g.Dim, by: g.Dim) -> g.Dim | None:
    """Return how often ``by`` goes into ``size``, None if that is no product of its factors.

    >>> quotient("6*B", "B"), quotient(48, 8), quotient("B", "S")
    (6, 6, None)
    """
    (count, symbols), (divisor, gone) = factors(size), factors(by)
    left = Counter(symbols)
    left.subtract(gone)
    if count % divisor or any(number < 0 for number in left.values()):
        return None
    return product(count // divisor, left.elements())


def product(count: int, symbols: Iterable[str]) -> g.Dim:
    """Return a size of these factors.

    >>> product(4, ["S", "B"]), product(6, [])
    ('4*B*S', 6)
    """
    names = sorted(symbols)
    return "*".join([*([str(count)] if count > 1 else []), *names]) if names else count


def shape_of(sizes: Iterable[g.Dim]) -> ir.Shape:
    """Return the shape of these sizes; what stands for an unknown size is unknown."""
    return ir.Shape([None if str(size).startswith("?") else size for size in sizes])


def spelled(sizes: Iterable[g.Dim]) -> str:
    """Return sizes as messages show them.

    >>> spelled(["B", 8])
    '[B, 8]'
    """
    return f"[{', '.join('?' if str(size).startswith('?') else str(size) for size in sizes)}]"


def symbols_of(graph: ir.Graph) -> set[str]:
    """Return the symbols that the sizes of the inputs consist of: all others are nobody's."""
    sizes = [size for value in graph.inputs for size in g.shape(value) or ()]
    return {symbol for size in sizes for symbol in factors(size)[1]}


def known(sizes: Iterable[g.Dim] | None, symbols: set[str]) -> bool:
    """Whether sizes consist of numbers and of these symbols."""
    return sizes is not None and all(symbols.issuperset(factors(size)[1]) for size in sizes)
