"""Mixtures of experts, of transformers and of hand, become one operator each, quantized or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from matrix_families import FAMILIES

import llmopt

MODEL = Path(__file__).parents[1] / "models" / "experts.py"


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


@pytest.mark.parametrize(("scheme", "op_type"), [(None, "MoE"), ("w4{block=16}", "QMoE")])
def test_experts_written_by_hand_run_as_one_operator(
    scheme: str | None, op_type: str, tmp_path: Path
) -> None:
    given = {"x": np.random.default_rng(6).standard_normal((2, 7, 48), np.float32)}

    artifact = llmopt.compile(
        f"{MODEL}:make", output=tmp_path / "out", quantize=scheme, example_inputs=given
    )

    model = onnx.load(artifact.path / "model.onnx", load_external_data=False)
    assert [n.op_type for n in model.graph.node].count(op_type) == 1
    assert "TopK" not in {n.op_type for n in model.graph.node}
    assert artifact.manifest.verification["worst_error_rel"] < 1e-5
