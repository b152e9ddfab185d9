"""Packed weights, as onnxruntime's own kernels read them."""

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from llmopt.quantization.numerics import dequantize, quantize_blockwise
from llmopt.quantization.packing import Packed, empty, pack, quantize_packed, unpack
from llmopt.quantization.schemes import BLOCKS, Blockwise

ROWS = 7


def packed_weight(bits: int, block: int, columns: int, *, symmetric: bool) -> Packed:
    weight = np.random.default_rng(bits + block + columns).standard_normal((ROWS, columns))
    weight[3] = 0
    weight[4] = np.abs(weight[4])
    return quantize_packed(weight, Blockwise(bits, block, symmetric))


def initializers(packed: Packed) -> dict[str, NDArray[np.generic]]:
    stored: dict[str, NDArray[np.generic]] = {"table": packed.table, "scale": packed.scale}
    return stored if packed.zero_point is None else {**stored, "zero": packed.zero_point}


def embedding_and_head(packed: Packed) -> ort.InferenceSession:
    """Return one model with one stored weight: ``rows`` of it by ``ids``, and ``x`` times it."""
    stored = {**initializers(packed), "shape": np.array([0, *packed.data.shape[1:]])}
    scales = [name for name in ("scale", "zero") if name in stored]
    kernel: dict[str, Any] = {
        "domain": "com.microsoft",
        "bits": packed.scheme.bits,
        "block_size": packed.scheme.block,
    }
    axes: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1}
    width: dict[str, Any] = {"K": packed.columns, "N": len(packed.data), "accuracy_level": 0}
    nodes = [
        helper.make_node(
            "GatherBlockQuantized", ["table", "ids", *scales], ["rows"], **axes, **kernel
        ),
        helper.make_node("Reshape", ["table", "shape"], ["data"]),
        helper.make_node("MatMulNBits", ["x", "data", *scales], ["y"], **width, **kernel),
    ]
    graph = helper.make_graph(
        nodes,
        "tied",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", packed.columns]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["B", "S"]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("rows", "y")],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


@pytest.mark.parametrize("columns", [40, 64, 100, 256])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kernels_read_what_was_packed(
    bits: int, block: int, columns: int, *, symmetric: bool
) -> None:
    """One stored weight serves the embedding's gather and the head's MatMulNBits."""
    packed = packed_weight(bits, block, columns, symmetric=symmetric)
    want = dequantize(unpack(packed))
    x = np.random.default_rng(0).standard_normal((3, columns), dtype=np.float32)
    ids = np.array([[0, 3, 6], [4, 4, 5]])
    session = embedding_and_head(packed)
    rows, y = session.run(None, {"x": x, "ids": ids})
    assert rows.shape == (2, 3, packed.scheme.padded(columns))
    np.testing.assert_array_equal(rows[..., :columns], want[ids])
    assert not rows[..., columns:].any()
    np.testing.assert_allclose(y, x @ want.T, atol=1e-4)
    (alone,) = session.run(["y"], {"x": x[:1], "ids": ids})
    np.testing.assert_allclose(alone, x[:1] @ want.T, atol=1e-4)


def test_weights_are_packed_low_nibble_first() -> None:
    packed = packed_weight(4, 16, 40, symmetric=False)
    codes = unpack(packed).codes
    assert packed.zero_point is not None
    np.testing.assert_array_equal(packed.data[2, 1] & 15, codes[2, 16:32:2])
    np.testing.assert_array_equal(packed.data[2, 1] >> 4, codes[2, 17:32:2])
    assert (packed.zero_point[:, -1] >> 4 == 0).all()  # 3 blocks: half a byte is unused


@pytest.mark.parametrize("columns", [16, 40, 100])
def test_three_bytes_hold_four_codes_of_six_bits_lowest_bits_first(columns: int) -> None:
    packed = packed_weight(6, 16, columns, symmetric=False)
    found = unpack(packed)
    for row, codes in zip(packed.table, found.codes, strict=True):
        number = sum(int(code) << (6 * place) for place, code in enumerate(codes))
        assert int.from_bytes(row.tobytes(), "little") == number
    assert packed.zero_point is not None
    assert found.zero_point is not None
    for row, points in zip(packed.zero_point, found.zero_point, strict=True):
        number = sum(int(point) << (6 * place) for place, point in enumerate(points))
        assert int.from_bytes(row.tobytes(), "little") == number


@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 6])
def test_packing_chunk_by_chunk_equals_packing_the_whole(
    bits: int, scale_dtype: type, *, symmetric: bool
) -> None:
    weight = np.random.default_rng(5).standard_normal((3000, 100), dtype=np.float32)
    scheme = Blockwise(bits, 16, symmetric)
    out = empty(3000, 100, scheme, scale_dtype)
    assert quantize_packed(weight, scheme, out=out) is out
    whole = pack(quantize_blockwise(weight, scheme, scale_dtype=scale_dtype))
    for name, array in initializers(whole).items():
        np.testing.assert_array_equal(initializers(out)[name], array, strict=True)


def test_arrays_made_for_another_weight_are_refused() -> None:
    weight = np.ones((4, 32), np.float32)
    for out in (empty(4, 33, Blockwise()), empty(5, 32, Blockwise()), empty(4, 32, Blockwise(8))):
        with pytest.raises(ValueError, match="out is for"):
            quantize_packed(weight, Blockwise(), out=out)
