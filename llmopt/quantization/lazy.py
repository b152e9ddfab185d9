"""Quantized weights, computed when a writer reads them, once for all of their parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import ml_dtypes
import numpy as np
import onnx_ir as ir

from llmopt.interface.arrays import Array
from llmopt.quantization.numerics import Importance
from llmopt.quantization.packing import Packed, quantize_packed
from llmopt.quantization.schemes import Blockwise

_CODES: Final = {
    2: ir.DataType.UINT2,
    4: ir.DataType.UINT4,
    6: ir.DataType.UINT8,  # the narrowest type in ONNX
    8: ir.DataType.UINT8,
}
_UNPACKED: Final = {2: ml_dtypes.uint2, 4: ml_dtypes.uint4, 6: np.uint8, 8: np.uint8}


class QuantizedWeight:
    """A weight [N, K] and its scheme; quantized when a part is first read.

    Args:
        base: Weight whose rows are outputs.
        scheme: Bits, block and symmetry.
        importance: [K] float32, importance of each column; None for equal importance.
    """

    _latest: QuantizedWeight | None = None  # only the weight being written is in memory

    def __init__(
        self, base: ir.TensorProtocol, scheme: Blockwise, importance: Importance | None = None
    ) -> None:
        self.base = base
        self.scheme = scheme
        self.importance = importance
        self.rows, self.columns = base.shape.numpy()
        self._packed: Packed | None = None

    def packed(self) -> Packed:
        """Return codes, scales and zero points; cached until another weight is read."""
        if self._packed is None:
            if QuantizedWeight._latest is not None:
                QuantizedWeight._latest._packed = None  # noqa: SLF001 - one class
            self._packed = quantize_packed(self.base.numpy(), self.scheme, self.importance)
            QuantizedWeight._latest = self
        return self._packed

    def codes(self) -> QuantizedPart:
        """Return the codes [N, K'] in the scheme's bits, for DequantizeLinear."""
        shape = (self.rows, self.scheme.padded(self.columns))
        return QuantizedPart(self, "codes", self._unpacked_codes, _CODES[self.scheme.bits], shape)

    def scale(self) -> QuantizedPart:
        """Return the scales [N, K'/block] float32."""
        return QuantizedPart(
            self, "scale", lambda: self.packed().scale, ir.DataType.FLOAT, self._blocks()
        )

    def zero_point(self) -> QuantizedPart:
        """Return the zero points [N, K'/block], the middle code where the scheme is symmetric."""
        return QuantizedPart(
            self, "zero_point", self._zero_points, _CODES[self.scheme.bits], self._blocks()
        )

    def bytes(self) -> QuantizedPart:
        """Return the codes in the layout of MatMulNBits: [N, K'/block, block*bits/8] uint8."""
        shape = (*self._blocks(), self.scheme.block * self.scheme.bits // 8)
        return QuantizedPart(self, "bytes", lambda: self.packed().data, ir.DataType.UINT8, shape)

    def table(self) -> QuantizedPart:
        """Return the codes in the layout of GatherBlockQuantized: [N, K'*bits/8] uint8."""
        shape = (self.rows, self.scheme.padded(self.columns) * self.scheme.bits // 8)
        return QuantizedPart(self, "table", lambda: self.packed().table, ir.DataType.UINT8, shape)

    def zero_bytes(self) -> QuantizedPart:
        """Return the zero points in the layout of MatMulNBits: [N, ceil(K'/block*bits/8)] uint8."""
        shape = (self.rows, -(-self._blocks()[1] * self.scheme.bits // 8))

        def read() -> Array:
            points = self.packed().zero_point
            assert points is not None
            return points

        return QuantizedPart(self, "zero_bytes", read, ir.DataType.UINT8, shape)

    def _blocks(self) -> tuple[int, int]:
        return self.rows, self.scheme.blocks(self.columns)

    def _unpacked_codes(self) -> Array:
        from llmopt.quantization.packing import unpack

        return unpack(self.packed()).codes.astype(_UNPACKED[self.scheme.bits])

    def _zero_points(self) -> Array:
        from llmopt.quantization.packing import unpack

        dtype = _UNPACKED[self.scheme.bits]
        points = None if self.scheme.symmetric else unpack(self.packed()).zero_point
        if points is None:
            return np.full(self._blocks(), self.scheme.middle, np.uint8).astype(dtype)
        return points.astype(dtype)


class QuantizedPart(ir.LazyTensor):
    """One tensor of a quantized weight.

    Args:
        of: Weight that the tensor is a part of.
        which: Name of the part.
        read: Function that computes the part.
        dtype: Element type.
        shape: Shape.
    """

    def __init__(
        self,
        of: QuantizedWeight,
        which: str,
        read: Callable[[], Array],
        dtype: ir.DataType,
        shape: tuple[int, ...],
    ) -> None:
        super().__init__(lambda: ir.tensor(read(), dtype), dtype, ir.Shape(shape))
        self.of = of
        self.which = which
