"""torch's table of ONNX functions is made once, and torch is left as it was."""

from __future__ import annotations

import pytest

from llmopt.frontend.torch import registry
from llmopt.frontend.torch.registry import shared_registry
from llmopt.frontend.torch.trace import quiet
from llmopt.ir.dialect import OPSET


def test_exports_share_one_table_of_an_opset_and_torch_gets_its_own_back() -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    before = vars(ONNXRegistry)["from_torchlib"]
    with quiet(), shared_registry():
        first = ONNXRegistry().from_torchlib(opset_version=OPSET)
        assert ONNXRegistry.from_torchlib(opset_version=OPSET) is first
        assert ONNXRegistry.from_torchlib(opset_version=20) is not first

    assert first.opset_version == OPSET
    assert vars(ONNXRegistry)["from_torchlib"] is before


def test_a_torch_that_keeps_its_table_elsewhere_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "_owner", lambda: object)
    with shared_registry():
        assert not hasattr(object, "from_torchlib")
