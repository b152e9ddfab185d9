"""How weights of products lie in memory: one layout for decoding and prefill.

Thirty-two outputs make a *tile*, two vectors of 512 bits; a thread reads a tile from its first
byte to its last, one stream. The halves of a tile of a gated feed-forward are 16 gates and the 16
rows that they gate. Rows that fill the last tile are zeros. For T tiles::

    float32   weights [T, K, 32] float32          weights[t, k, i] = W[row(t, i), k]
    bf16      weights [T, K'/2, 32] int32         a lane is 2 numbers of one row, the first low

    w4        codes   [T, K'/8, 32] int32         a lane is 8 codes of one row:
                bits  31-28 27-24 23-20 19-16 15-12 11-8  7-4   3-0
                k     8j+7  8j+3  8j+6  8j+2  8j+5  8j+1  8j+4  8j+0
    w6        codes   [T, K'*3/16, 32] int32      three lanes are 16 codes of one row:
                0, 1  their lowest 4 bits, 16j … 16j+7 and 16j+8 … 16j+15, as in w4
                2     their highest 2 bits; k = 16j + those of its four bytes:
                bits  7-6 5-4 3-2 1-0 of byte b
                k     12+b 8+b 4+b b
    w8, int8  codes   [T, K'/4, 32] int32         a lane is 4 codes of one row, k = 4j first

    scale      [T, K'/block, 32]                  float16 or float32; int8: [T, 1, 32] float32
    zero_point [T, K'/block, 32] uint8 or int8    only where the scheme stores one

``codes & 0x0f0f0f0f`` are the four bytes k = 8j … 8j+3 of 32 rows, ``codes >> 4 & 0x0f0f0f0f``
the next four: a *quad*, which is what products of four bytes take, and a row of a tile of AMX. In 6
bits two bits are added from the third lane; `Storage.quad` says which bits of which lanes. A row of
an embedding tied to a head can be gathered from the same arrays, 128 bytes apart.

Sixteen such lanes of ``bf16`` below each other are what a tile of AMX takes: no panel is unpacked.

Codes of 4 and 6 bits are stored as they are. Codes of 8 bits are stored as what multiplies exactly:
unsigned for VNNI, signed for the others; int8 codes of -64 … 64 as 0 … 128 for AVX2. `middle` is
the stored code that means zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from llmopt.backends.tvm.features import Features
from llmopt.quantization.schemes import Blockwise

TILE: Final = 32
"""Outputs in a tile."""
HALF: Final = 16
"""Gates in a tile of a gated product, and rows that they gate."""
STEP: Final = 32
"""The padded length of a row of int8 codes is a multiple of it, of twice that for AMX."""
SHARED: Final = 128
"""Columns of activations that share a scale, at most, where weights have 4 bits."""


DEPTH: Final = 32
"""Columns of bfloat16 in a tile of AMX."""


class BitField(NamedTuple):
    """Bits of a lane: moved to the right, the others masked out."""

    word: int
    """Which lane of its unit."""
    right: int
    """How far; to the left if negative."""
    mask: int
    """Which bits then count; -1 for all."""


@dataclass(frozen=True)
class Storage:
    """How the codes of a weight are stored.

    Args:
        bits: Width of a code: 4, 6 or 8.
        block: Columns that share a scale; the whole padded row where a row has one scale.
        columns: Length of a padded row, K'.
        middle: The stored code of zero, where no zero point is stored.
        signed: Whether stored codes of 8 bits are signed.
        zero_points: Whether each block has its own.
        scale: Type of the scales.
        channels: Whether a row has one scale, as int8 codes have, and not one a block.
    """

    bits: int
    block: int
    columns: int
    middle: int
    signed: bool
    zero_points: bool
    scale: str
    channels: bool = False

    @property
    def blocks(self) -> int:
        """How many scales a row has."""
        return self.columns // self.block

    @property
    def shared(self) -> int:
        """How many blocks share a scale of activations: they divide the row, up to `SHARED`.

        Only beside weights of 4 bits, whose own error hides the difference: the KL divergence of
        SmolLM2 in 8 bits would rise from 0.007 to 0.018.
        """
        most = max(1, SHARED // self.block) if self.bits <= 4 else 1
        return max(count for count in range(1, most + 1) if self.blocks % count == 0)

    @property
    def scheme(self) -> Blockwise | None:
        """The scheme of a weight in blocks."""
        if self.channels:
            return None
        return Blockwise(self.bits, self.block, not self.zero_points)

    @property
    def unit(self) -> int:
        """How many columns fill whole lanes of 32 bits; it divides every block."""
        return {4: 8, 6: 16, 8: 4}[self.bits]

    @property
    def words(self) -> int:
        """How many lanes `unit` columns fill."""
        return self.unit * self.bits // 32

    def quad(self, index: int) -> tuple[BitField, ...]:
        """Return which bits of a unit's lanes make quad ``index`` of it."""
        if self.bits == 8:
            return (BitField(index, 0, -1),)
        low = BitField(index // 2, 4 * (index % 2), 0x0F0F0F0F)
        return (low,) if self.bits == 4 else (low, BitField(2, 2 * index - 4, 0x30303030))

    @property
    def largest(self) -> int:
        """The largest stored code, or magnitude of one."""
        return 2 * self.middle if self.middle == 64 else (1 << self.bits) - 1


@dataclass(frozen=True)
class Halves:
    """How weights in bfloat16 are stored.

    Args:
        columns: Length of a padded row, K'.
    """

    columns: int


def half_storage(k: int, features: Features) -> Halves:
    """Return how a weight in bfloat16 is stored: whole pairs, and whole tiles for AMX."""
    step = DEPTH if features.amx_bf16 else 2
    return Halves(-(-k // step) * step)


def block_storage(scheme: Blockwise, k: int, scale: str, features: Features) -> Storage:
    """Return how a weight in blocks is stored for a processor."""
    signed = scheme.bits == 8 and not (features.avx512vnni or features.avxvnni)
    middle = 0 if signed else scheme.middle
    columns = scheme.padded(k)
    return Storage(scheme.bits, scheme.block, columns, middle, signed, not scheme.symmetric, scale)


def channel_storage(k: int, limit: int, features: Features) -> Storage:
    """Return how int8 codes of -limit … limit with one scale a row are stored."""
    step = 2 * STEP if features.amx_int8 else STEP
    columns = -(-k // step) * step
    vnni = features.avx512vnni or features.avxvnni
    middle = 128 if vnni else 64 if features.avx2 and limit <= 64 else 0
    return Storage(
        8,
        columns,
        columns,
        middle,
        signed=middle == 0,
        zero_points=False,
        scale="float32",
        channels=True,
    )


def tiles(n: int, *, paired: bool) -> int:
    """Return how many tiles ``n`` rows take.

    >>> tiles(576, paired=False), tiles(40, paired=False), tiles(40, paired=True)
    (18, 2, 2)
    """
    return -(-(n // 2) // HALF) if paired else -(-n // TILE)
