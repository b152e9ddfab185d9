"""Quantization schemes: frozen values, and the text that names them.

``w4`` is a scheme, ``w4{block=64,symmetric=false}`` one with options. The text of a scheme is
the same on the command line, in precision plans and in manifests.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal

from typing_extensions import override

from llmopt import spelling
from llmopt.errors import UnknownNameError, UsageError

BLOCKS: Final = (16, 32, 64, 128, 256)
SCALES: Final = ("float32", "float16", "bfloat16")
_BITS: Final = (2, 4, 6, 8)
_NAMED: Final = frozenset({"bits", "dtype", "code"})
"""Fields that the name of a scheme stands for; the others are its options."""


@dataclass(frozen=True)
class BlockCodes:
    """The codes of blocks: the fields that a scheme and the passes that round to it share.

    Args:
        bits: Width of a code: 4, 6 or 8; 2 is for experiments, and no scheme has it.
        block: Columns that share a scale: 16, 32, 64, 128 or 256.
        symmetric: Whether the zero point is the middle code instead of one stored per block.
        positive: Whether the scale is positive, though a negative one may fit a block better.
        scale: Type of the scales, which are rounded to it before codes are chosen: float32,
            float16 or bfloat16.

    Raises:
        UsageError: another width, block or type.
    """

    bits: int = 4
    block: int = 32
    symmetric: bool = True
    positive: bool = False
    scale: str = "float32"

    def __post_init__(self) -> None:
        """Refuse what no kernel has."""
        if self.bits not in _BITS:
            raise UsageError(f"bits={self.bits}: a code has 2, 4, 6 or 8 bits")
        if self.block not in BLOCKS:
            raise UsageError(f"block={self.block}: choose one of {', '.join(map(str, BLOCKS))}")
        if self.scale not in SCALES:
            raise UsageError(f"scale={self.scale}: choose one of {', '.join(SCALES)}")

    @property
    def codes(self) -> dict[str, Any]:
        """The fields of this class alone."""
        return {field.name: getattr(self, field.name) for field in fields(BlockCodes)}


@dataclass(frozen=True)
class Blockwise(BlockCodes):
    """Weights in unsigned codes, one scale for each block of one row; activations stay float.

    Range: ``(code - zero_point) * scale``, ``code`` in 0 … 2**bits - 1. Without a zero point
    (``symmetric``) it is 2**(bits - 1), and the scale may be negative, unless ``positive`` says
    that the machine takes no such scale.

    A head of N = 49152 rows and K = 576 columns, in 4 bits and blocks of 32:

    >>> w4 = Blockwise(bits=4, block=32)
    >>> w4.blocks(576), w4.levels, w4.middle
    (18, 16, 8)
    >>> w4.size_bytes(49152, 576, scale_bytes=4)
    17694720
    >>> w4.size_bytes(49152, 576, scale_bytes=4) * 8 / (49152 * 576)
    5.0

    The last block is padded when K is not a multiple of the block:

    >>> w4.blocks(100), w4.padded(100)
    (4, 128)

    Args:
        head: Bits of the projection to the vocabulary, and of the embedding where it is the same
            table; 0 for as many as the others.

    Raises:
        UsageError: another width, block or type.
    """

    head: int = 0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head not in {0, *_BITS}:
            raise UsageError(f"head={self.head}: a code has 4, 6 or 8 bits")

    @property
    def name(self) -> str:
        """The name without options."""
        return f"w{self.bits}"

    def of(self, *, head: bool) -> Blockwise:
        """Return the scheme of one weight: of the head, or of any other.

        >>> scheme = Blockwise(bits=4, head=8)
        >>> str(scheme), str(scheme.of(head=True)), str(scheme.of(head=False))
        ('w4{head=8}', 'w8', 'w4')
        """
        return replace(self, bits=(self.head if head else 0) or self.bits, head=0)

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The zero point where none is stored."""
        return 1 << (self.bits - 1)

    @property
    def searched(self) -> bool:
        """Whether scales are searched: in 8 bits nothing is gained.

        Positive ones are not: TensorRT, whose they are, computes in 16 bits, and with the scales
        found for SmolLM2 that rounding moves a token of the proof onto an attention sink.
        """
        return self.symmetric and self.bits < 8 and not self.positive

    def blocks(self, columns: int) -> int:
        """Return how many blocks a row of ``columns`` has."""
        return -(-columns // self.block)

    def padded(self, columns: int) -> int:
        """Return how many codes a row of ``columns`` has, padding included."""
        return self.blocks(columns) * self.block

    def size_bytes(self, rows: int, columns: int, scale_bytes: int) -> int:
        """Return the size of codes, scales and zero points as `packing` stores them."""
        blocks = self.blocks(columns)
        points = 0 if self.symmetric else -(-blocks * self.bits // 8)
        return rows * (blocks * (self.block * self.bits // 8 + scale_bytes) + points)

    @override
    def __str__(self) -> str:
        return spelling.spell(self, _NAMED)


@dataclass(frozen=True)
class DynamicInt8:
    """Weights in int8, one scale per output channel; activations in int8, one scale per row.

    A row is one token: its scale is found when it arrives (*dynamic*) and depends on nothing
    else in the batch. Both are symmetric, -127 … 127, so zero is exact and no sum of codes has
    to be corrected.

    An FFN of E = 384 → F = 1536 on 1024 tokens has 1536 weight scales and 1024 activation
    scales, and saves three quarters of the weights' bytes:

    >>> scheme = DynamicInt8()
    >>> str(scheme), scheme.size_bytes(384, 1536), 384 * 1536 * 4
    ('w8a8-dynamic', 595968, 2359296)
    """

    def size_bytes(self, rows: int, columns: int) -> int:
        """Return the size of a weight [rows = K, columns = N]: int8 codes, float32 scales."""
        return rows * columns + 4 * columns

    @property
    def name(self) -> str:
        """The name."""
        return "w8a8-dynamic"

    @override
    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Cast:
    """Weights and activations in a narrower float: no scales.

    >>> str(Cast("float16")), Cast("bfloat16").size_bytes(49152, 576)
    ('fp16', 56623104)

    Args:
        dtype: ``"float16"`` or ``"bfloat16"``.
    """

    dtype: Literal["float16", "bfloat16"]

    def size_bytes(self, rows: int, columns: int) -> int:
        """Return the size of a weight [rows, columns]."""
        return 2 * rows * columns

    @property
    def name(self) -> str:
        """The name."""
        return {"float16": "fp16", "bfloat16": "bf16"}[self.dtype]

    @override
    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Static:
    """Weights in 8 bits, one scale per output channel; activations too, one scale per tensor.

    The scales of activations are found once, on calibration data (*static*), and are symmetric:
    ``code * scale``, codes -127 … 127 of int8 or float8 (E4M3, up to 448) numbers.

    >>> str(Static("int8")), str(Static("float8")), Static("int8").limit
    ('w8a8', 'fp8', 127.0)

    Args:
        code: ``"int8"`` or ``"float8"``.
    """

    code: Literal["int8", "float8"]

    @property
    def limit(self) -> float:
        """The largest magnitude of a code."""
        return {"int8": 127.0, "float8": 448.0}[self.code]

    def size_bytes(self, rows: int, columns: int) -> int:
        """Return the size of a weight [rows = K, columns = N]: codes, and float16 scales."""
        return rows * columns + 2 * columns

    @property
    def name(self) -> str:
        """The name."""
        return {"int8": "w8a8", "float8": "fp8"}[self.code]

    @override
    def __str__(self) -> str:
        return self.name


Scheme = Blockwise | DynamicInt8 | Cast | Static

_PLAIN: Final[tuple[Scheme, ...]] = (
    Blockwise(bits=8),
    Blockwise(bits=6),
    Blockwise(bits=4),
    DynamicInt8(),
    Cast("float16"),
    Cast("bfloat16"),
    Static("int8"),
    Static("float8"),
)

SCHEMES: Final[dict[str, str]] = {
    "w8": "weights in 8 bits, a scale per block of 32 columns; activations stay float",
    "w6": "weights in 6 bits, a scale per block of 32 columns; activations stay float",
    "w4": "weights in 4 bits, a scale per block of 32 columns; activations stay float",
    "w8a8-dynamic": "int8 weights per output channel, int8 activations scaled per token; encoders",
    "fp16": "weights and activations in IEEE half precision",
    "bf16": "weights and activations in bfloat16; tvm-cpu: weights alone",
    "w8a8": "int8 weights per output channel, int8 activations per tensor, calibrated; encoders",
    "fp8": "float8 (E4M3) weights per output channel, activations per tensor, calibrated; encoders",
}


def parse_scheme(text: str) -> Scheme:
    """Return the scheme that ``text`` names.

    >>> parse_scheme("w4{block=64,symmetric=false}")
    Blockwise(bits=4, block=64, symmetric=False, positive=False, scale='float32', head=0)
    >>> str(parse_scheme("w8{symmetric=true,block=128}"))
    'w8{block=128}'

    Args:
        text: A name of `SCHEMES`, options in braces.

    Raises:
        UnknownNameError: no such scheme, or no such option of it.
        UsageError: the text is not of this form, an option's value is none it can take, or
            schemes are joined by ``+``.
    """
    if "+" in text:
        raise UsageError(f"{text!r} joins schemes with '+', which is not possible yet: name one")
    name, written = spelling.split(text, "scheme")
    plain = {scheme.name: scheme for scheme in _PLAIN}
    if name not in plain:
        raise UnknownNameError("scheme", name, plain, "`llmopt compile --help` shows use")
    scheme = plain[name]
    options = [o for o in spelling.options_of(type(scheme)) if o.name not in _NAMED]
    return replace(scheme, **spelling.read(options, written, f"scheme {name}"))
