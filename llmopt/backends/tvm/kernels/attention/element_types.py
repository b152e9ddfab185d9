"""What the products of attention are made of: float32, or pairs of bfloat16 for ``vdpbf16ps``.

A pair is 32 bits, the first number in the low half. One instruction multiplies 16 pairs by 16 pairs
and adds both products of each to a float32: twice the multiplications of float32, rounded to 8
bits before, summed in float32. Softmax stays in float32.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from tvm.script import tirx as T  # noqa: N812 - the script language's own name
from typing_extensions import override

from llmopt.backends.tvm.kernels.vectors import lanes_of, shuffled, splat


class Numbers(abc.ABC):
    """How numbers are kept and multiplied.

    Attributes:
        per: Numbers in one element.
        dtype: Of an element.
        code: LLVM's text of functions that kernels call; empty for none.
    """

    per: ClassVar[int]
    dtype: ClassVar[str]
    code: ClassVar[str] = ""

    @abc.abstractmethod
    def packed(self, vectors: Sequence[Any]) -> Any:
        """Return elements whose lane i holds lane i of each of ``per`` float32 vectors."""

    @abc.abstractmethod
    def joined(self, vectors: Sequence[Any]) -> Any:
        """Return elements that hold ``per`` float32 vectors one after the other."""

    @abc.abstractmethod
    def multiplied(self, first: Any, second: Any, total: Any) -> Any:
        """Return a float32 vector: ``total`` plus the products of the elements' numbers."""


@dataclass(frozen=True)
class Floats(Numbers):
    """float32, one number an element."""

    per: ClassVar[int] = 1
    dtype: ClassVar[str] = "float32"

    @override
    def packed(self, vectors: Sequence[Any]) -> Any:
        return vectors[0]

    @override
    def joined(self, vectors: Sequence[Any]) -> Any:
        return vectors[0]

    @override
    def multiplied(self, first: Any, second: Any, total: Any) -> Any:
        return total + first * second


_DOT: Final = "llvm.x86.avx512bf16.dpbf16ps.512"
_CODE: Final = f"""
define <16 x float> @llmopt_dot_bf16(<16 x float> %total, <16 x i32> %a, <16 x i32> %b) {{
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @{_DOT}(<16 x float> %total, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}}
declare <16 x float> @{_DOT}(<16 x float>, <32 x bfloat>, <32 x bfloat>)
"""


@dataclass(frozen=True)
class BfloatPairs(Numbers):
    """bfloat16, two numbers an element; needs AVX512-BF16.

    The instruction is called through a function in LLVM's own text, because TVM turns every
    bfloat16 of its own into float32.
    """

    per: ClassVar[int] = 2
    dtype: ClassVar[str] = "int32"
    code: ClassVar[str] = _CODE

    @override
    def packed(self, vectors: Sequence[Any]) -> Any:
        low, high = (_rounded(vector) for vector in vectors)
        lanes = lanes_of(low)
        upper = T.bitwise_and(high, splat(T.uint32(0xFFFF0000), lanes))
        both = T.bitwise_or(upper, T.shift_right(low, splat(T.uint32(16), lanes)))
        return T.reinterpret(both, dtype=f"int32x{lanes}")

    @override
    def joined(self, vectors: Sequence[Any]) -> Any:
        first, second = (T.bind(vector) for vector in vectors)
        lanes = lanes_of(first)
        even = shuffled(first, second, list(range(0, 2 * lanes, 2)))
        return self.packed([even, shuffled(first, second, list(range(1, 2 * lanes, 2)))])

    @override
    def multiplied(self, first: Any, second: Any, total: Any) -> Any:
        return T.call_pure_extern("float32x16", "llmopt_dot_bf16", total, first, second)


def _rounded(vector: Any) -> Any:
    """Return the bits of float32 numbers, half a unit of bfloat16 added."""
    lanes = lanes_of(vector)
    return T.reinterpret(vector, dtype=f"uint32x{lanes}") + splat(T.uint32(0x8000), lanes)
