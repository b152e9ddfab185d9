"""Mixtures of experts of transformers become one operator each, quantized or not."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from matrix_families import FAMILIES

import llmopt


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "op_type"), [(None, "MoE"), ("w4", "QMoE"), ("w8", "QMoE")])
def test_experts_of_a_family_run_as_one_operator(
    scheme: str | None, op_type: str, tmp_path: Path
) -> None:
    FAMILIES["qwen3_moe"].write(tmp_path / "source")

    artifact = llmopt.compile(tmp_path / "source", output=tmp_path / "out", quantize=scheme)

    model = onnx.load(artifact.path / "model.onnx", load_external_data=False)
    experts = [n for n in model.graph.node if n.op_type in {"MoE", "QMoE", "GatherND", "TopK"}]
    assert [node.op_type for node in experts if node.op_type != "GatherND"] == [op_type] * 2
    assert artifact.manifest.verification["worst_error_rel"] < 1e-5
    stored = {init.data_type for init in model.graph.initializer if ".experts." in init.name}
    codes = {onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT}  # codes and their scales
    assert stored == (codes if scheme else {onnx.TensorProto.FLOAT})
