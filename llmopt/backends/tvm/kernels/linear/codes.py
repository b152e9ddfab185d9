"""Codes from the lanes of 32 bits in which weights lie: four bytes a lane, as products take them.

Bits of a lane are moved and masked; in 6 bits those of two lanes are joined (`Storage.quad`). That
is one or two operations for a vector in 4 bits, four or five in 6, fewer where a processor's logic
takes three operands.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import or_

from llmopt.backends.tvm.kernels.linear.storage import BitField, Storage
from llmopt.backends.tvm.kernels.script import Expr, integer


def four_codes(storage: Storage, quad: int, word: Callable[[int], Expr], lanes: int) -> Expr:
    """Return the codes of four columns, a byte each.

    Args:
        storage: Layout of the weights.
        quad: Index of the four columns in their unit.
        word: Gives the lanes [lanes] int32 of one word of the unit.
        lanes: Lanes of a vector.
    """
    pieces = storage.quad(quad)
    found: Expr = reduce(or_, (_moved(word(piece.word), piece, lanes) for piece in pieces))
    return found


def _moved(words: Expr, piece: BitField, lanes: int) -> Expr:
    if piece.right > 0:
        words = words >> integer(piece.right, lanes)
    elif piece.right < 0:
        words = words << integer(-piece.right, lanes)
    return words if piece.mask < 0 else words & integer(piece.mask, lanes)
