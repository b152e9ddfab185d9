"""ONNX files: read lazily, raised to one opset, refused with a reason."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmopt.errors import BackendUnavailableError, SourceError, UnsupportedModelError
from llmopt.frontend.base import Source, SourceOptions
from llmopt.frontend.onnx.reference import OnnxReference
from llmopt.frontend.source import open_source
from llmopt.ir.dialect import OPSET
from llmopt.ir.weights import Leaf

VOCABULARY, HIDDEN = 11, 6


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "table": rng.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32),
        "matrix": rng.standard_normal((HIDDEN, 5)).astype(np.float32),
    }


def model(
    nodes: list[onnx.NodeProto] | None = None,
    *,
    shape: tuple[Any, ...] = ("batch", "length"),
    opset: int = 17,
    **more: Any,
) -> onnx.ModelProto:
    """Return tokens -> table -> matrix, or other nodes between ``ids`` and ``out``."""
    nodes = nodes or [
        helper.make_node("Gather", ["table", "ids"], ["hidden"], name="look"),
        helper.make_node("MatMul", ["hidden", "matrix"], ["out"], name="map"),
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights().items()]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, shape)]
    inputs += more.pop("inputs", [])
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, [*shape, 5])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", opset), *more.pop("opsets", [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, **more)


def saved(proto: onnx.ModelProto, folder: Path, *, external: bool = False) -> Path:
    path = folder / "model.onnx"
    extra: dict[str, Any] = {
        "save_as_external_data": True,
        "location": "model.data",
        "size_threshold": 0,
    }
    onnx.save(proto, path, **(extra if external else {}))
    return path


def opened(path: Path) -> Source:
    return open_source(path, SourceOptions())


@pytest.mark.parametrize("external", [False, True])
def test_weights_stay_where_they_are_until_they_are_read(tmp_path: Path, external: bool) -> None:
    source = opened(saved(model(), tmp_path, external=external))
    graph = source.program.graph
    assert graph.opset_imports == {"": OPSET}
    assert [p.shape for p in source.program.signature.inputs] == [("B", "S")]
    assert source.program.signature.outputs[0].name == "logits"
    assert (source.program.facts.model.vocabulary, source.program.facts.model.hidden) == (11, 6)
    for name, array in weights().items():
        tensor = graph.initializers[name].const_value
        assert isinstance(tensor, Leaf)
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_the_file_itself_is_the_reference(tmp_path: Path) -> None:
    source = opened(saved(model(), tmp_path, external=True))
    ids = np.arange(6).reshape(2, 3)

    def doubled(name: str, array: np.ndarray) -> np.ndarray:
        return array * 2 if name == "matrix" else array

    (plain,) = source.reference.run([{"ids": ids}])
    (twice,) = source.reference.run([{"ids": ids}], doubled)
    want = weights()["table"][ids] @ weights()["matrix"]
    np.testing.assert_allclose(plain["logits"], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(twice["logits"], 2 * want, rtol=1e-5, atol=1e-6)


def test_external_data_must_be_whole_and_beside_the_model(tmp_path: Path) -> None:
    path = saved(model(), tmp_path, external=True)
    data = tmp_path / "model.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-8])
    with pytest.raises(SourceError, match=r"truncated: '\w+' ends at byte \d+ of \d+"):
        opened(path)
    data.unlink()
    with pytest.raises(SourceError, match=r"model\.data is missing"):
        opened(path)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        tensor.external_data[0].value = "../secret"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(SourceError, match="outside its folder"):
        opened(path)


def test_the_digest_covers_external_data(tmp_path: Path) -> None:
    path = saved(model(), tmp_path, external=True)
    before = opened(path).program.facts.source.digest
    data = bytearray((tmp_path / "model.data").read_bytes())
    data[0] ^= 1
    (tmp_path / "model.data").write_bytes(data)
    assert opened(path).program.facts.source.digest != before


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: str) -> None:
    path = saved(model(), tmp_path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "noise": b"\xff" * 99, "empty": b""}[damage])
    with pytest.raises(SourceError) as caught:
        opened(path)
    assert "\n" not in str(caught.value)


def test_vendor_operators_are_all_listed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"]),
        helper.make_node("FusedMatMul", ["a", "matrix"], ["b"], domain="com.microsoft"),
        helper.make_node("QuickGelu", ["b"], ["out"], domain="com.microsoft"),
    ]
    path = saved(model(nodes, opsets=[helper.make_opsetid("com.microsoft", 1)]), tmp_path)
    with pytest.raises(UnsupportedModelError) as caught:
        opened(path)
    assert caught.value.problems == ["1 x com.microsoft.FusedMatMul", "1 x com.microsoft.QuickGelu"]


def test_functions_are_inlined(tmp_path: Path) -> None:
    body = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    function = helper.make_function(
        "mine", "Map", ["x", "w"], ["y"], body, [helper.make_opsetid("", 17)]
    )
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["hidden"]),
        helper.make_node("Map", ["hidden", "matrix"], ["out"], domain="mine"),
    ]
    proto = model(nodes, functions=[function], opsets=[helper.make_opsetid("mine", 1)])
    source = opened(saved(proto, tmp_path))
    assert [node.op_type for node in source.program.graph] == ["Gather", "MatMul"]


def test_an_operator_of_a_newer_opset_than_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="opset 99 cannot be converted to"):
        opened(saved(model(opset=99), tmp_path))


def test_fixed_shapes_and_caches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="'ids' is fixed at"):
        opened(saved(model(shape=(1, 8)), tmp_path))
    past = helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, [1, 2, 3, 4])
    with pytest.raises(UnsupportedModelError, match="takes a KV cache"):
        opened(saved(model(inputs=[past]), tmp_path))


def test_sizes_without_names_and_listed_initializers_are_understood(tmp_path: Path) -> None:
    listed = helper.make_tensor_value_info("matrix", TensorProto.FLOAT, [HIDDEN, 5])
    source = opened(saved(model(shape=(None, None), inputs=[listed]), tmp_path))
    assert [(p.name, p.shape) for p in source.program.signature.inputs] == [("ids", ("B", "S"))]


def test_norms_and_attentions_are_counted_in_the_file(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("ReduceMean", ["square"], ["mean"], axes=[-1]),
        helper.make_node("Constant", [], ["small"], value_float=1e-6),
        helper.make_node("Add", ["mean", "small"], ["more"]),
        helper.make_node("Sqrt", ["more"], ["root"]),
        helper.make_node("Div", ["x", "root"], ["normal"]),
        helper.make_node("MatMul", ["normal", "matrix"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["out"], axis=-1),
    ]
    source = opened(saved(model(nodes), tmp_path))
    assert source.program.facts.expected == {"attention": 1, "norm": 1}


def test_what_onnxruntime_refuses_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [helper.make_node("MatMul", ["table", "table"], ["out"])]
    path = saved(model(nodes), tmp_path)
    reference = OnnxReference(path, ["ids"], ["out"], {})
    with pytest.raises(SourceError, match="onnxruntime refuses it"):
        list(reference.run([{"ids": np.zeros((1, 1), np.int64)}]))
    monkeypatch.setattr("llmopt.frontend.onnx.reference.find_spec", lambda _: None)
    with pytest.raises(BackendUnavailableError, match="pip install"):
        list(reference.run([]))
    assert "onnxruntime" in sys.modules
