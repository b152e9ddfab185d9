"""Dynamic int8: the arithmetic, and that onnxruntime does the same."""

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from llmopt.errors import UnsupportedModelError
from llmopt.quantization.dynamic import (
    Columns,
    dequantize_columns,
    dequantize_rows,
    matmul,
    quantize_columns,
    quantize_rows,
)

STEP = np.float32(1 / 127)


def data(rows: int = 33, inner: int = 96, columns: int = 24) -> tuple[NDArray[np.float32], ...]:
    rng = np.random.default_rng(3)
    spread = rng.lognormal(size=(rows, 1)).astype(np.float32)
    return (
        rng.standard_normal((rows, inner), dtype=np.float32) * spread,
        rng.standard_normal((inner, columns), dtype=np.float32),
    )


def onnxruntime_matmul(x: NDArray[np.float32], columns: Columns) -> NDArray[np.float32]:
    """Run the nodes that the module's docstring lists."""
    microsoft = "com.microsoft"
    nodes = [
        helper.make_node("Abs", ["x"], ["size"]),
        helper.make_node("ReduceMax", ["size", "axis"], ["most"], keepdims=1),
        helper.make_node("Max", ["most", "tiny"], ["largest"]),
        helper.make_node("Div", ["x", "largest"], ["unit"]),
        helper.make_node("QuantizeLinear", ["unit", "step", "zero"], ["xq"]),
        helper.make_node(
            "MatMulIntegerToFloat", ["xq", "wq", "step", "scale", "zero"], ["sum"], domain=microsoft
        ),
        helper.make_node("Mul", ["sum", "largest"], ["y"]),
    ]
    stored = {
        "axis": np.array([-1]),
        "tiny": np.float32(1e-30),
        "step": STEP,
        "zero": np.uint8(128),
        "wq": columns.codes,
        "scale": columns.scale,
    }
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(microsoft, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return result


def test_errors_are_at_most_half_a_step() -> None:
    x, w = data()
    rows, columns = quantize_rows(x), quantize_columns(w)
    assert (np.abs(dequantize_rows(rows) - x) <= rows.scale * 0.5001).all()
    assert (np.abs(dequantize_columns(columns) - w) <= columns.scale * 0.5001).all()
    assert rows.codes.min() >= 1
    assert np.abs(columns.codes).max() == 127


def test_the_product_is_near_the_float_one() -> None:
    x, w = data()
    want = x @ w
    error = np.abs(matmul(x, quantize_columns(w)) - want).max(axis=1)
    assert (error / np.abs(want).max(axis=1)).max() < 0.03


def test_onnxruntime_computes_the_same() -> None:
    x, w = data()
    x[4] = 0
    columns = quantize_columns(w, limit=64)  # exact on processors without VNNI too
    got, want = onnxruntime_matmul(x, columns), matmul(x, columns)
    per_code = columns.scale.max() * 64 * np.abs(x).max(axis=1, keepdims=True) * STEP
    assert (np.abs(got - want) <= 1.01 * per_code + 1e-6).all()  # a tie may round the other way
    assert np.median(np.abs(got - want) / np.abs(want).max()) < 1e-6
    assert not got[4].any()


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    x, w = data()
    columns = quantize_columns(w)
    np.testing.assert_array_equal(matmul(x, columns)[:3], matmul(x[:3], columns))
    limited = quantize_columns(w, limit=64)
    together, alone = onnxruntime_matmul(x, limited), onnxruntime_matmul(x[:3], limited)
    np.testing.assert_array_equal(together[:3], alone)


def test_a_smaller_limit_keeps_sums_of_two_products_within_16_bits() -> None:
    _, w = data()
    codes = quantize_columns(w, limit=64).codes.astype(int)
    assert np.abs(codes).max() == 64
    assert 255 * 64 * 2 < 2**15 < 255 * 65 * 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = np.ones((4000, 64))
    weight[3999, 5] = bad
    with pytest.raises(UnsupportedModelError, match="column 5 holds NaN or infinity"):
        quantize_columns(weight)


def test_a_weight_that_is_zero_stays_zero() -> None:
    columns = quantize_columns(np.zeros((3, 2)))
    assert columns.scale.tolist() == [1, 1]
    assert not dequantize_columns(columns).any()
