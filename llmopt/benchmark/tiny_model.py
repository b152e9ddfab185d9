"""An ONNX model of one product, encoded by hand, because the runtime does not need ``onnx``.

Source: onnx/onnx.proto (field numbers), https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

_TYPES: Final = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6}
_IR_VERSION: Final = 8
_OPSET: Final = 13


def product_model(
    op: str, weight: npt.NDArray[np.generic], x: tuple[str, Sequence[int]], y: str
) -> bytes:
    """Return the model ``y = op(x, weight)``.

    Args:
        op: ``"MatMul"`` or ``"MatMulInteger"``.
        weight: [K, N], stored in the model.
        x: Element type and shape [M, K] of the input.
        y: Element type of the output [M, N].
    """
    dtype, shape = x
    node = _text(1, "x") + _text(1, "w") + _text(2, "y") + _text(4, op)
    tensor = b"".join(_number(1, size) for size in weight.shape)
    tensor += _number(2, _TYPES[weight.dtype.name]) + _text(8, "w") + _bytes(9, weight.tobytes())
    graph = _bytes(1, node) + _text(2, "product") + _bytes(5, tensor)
    graph += _bytes(11, _value("x", dtype, shape))
    graph += _bytes(12, _value("y", y, [shape[0], weight.shape[1]]))
    return _number(1, _IR_VERSION) + _bytes(7, graph) + _bytes(8, _number(2, _OPSET))


def _value(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    """Return a ValueInfoProto."""
    sizes = b"".join(_bytes(1, _number(1, size)) for size in shape)
    tensor = _number(1, _TYPES[dtype]) + _bytes(2, sizes)
    return _text(1, name) + _bytes(2, _bytes(1, tensor))


def _text(field: int, text: str) -> bytes:
    return _bytes(field, text.encode())


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
