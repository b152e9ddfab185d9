"""Engines are built without a GPU, their layers read back, and what cannot be built is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support.programs import bound, program

from llmopt.backends import find_backend
from llmopt.backends.base import Demand
from llmopt.backends.tensorrt import REPORT
from llmopt.backends.tensorrt.legalize_attention import LegalizeAttention
from llmopt.backends.tensorrt.report import attentions, read_layers, summary
from llmopt.errors import (
    ArtifactError,
    BackendUnavailableError,
    LlmoptError,
    UnsupportedModelError,
    UsageError,
)
from llmopt.passes.convert_float import ConvertFloat
from llmopt.quantization.schemes import parse_scheme
from llmopt.runtime.engines import tensorrt_build
from llmopt.runtime.engines.tensorrt_build import build_engine, import_tensorrt
from llmopt.runtime.engines.tensorrt_recipe import (
    NETWORK,
    EngineRecipe,
    InputRange,
    Profile,
)

ATTENTION: Final = """main (float[B,S,64] x, float[64,64] wq) => (float[B,S,64] y)
{ q = MatMul (x, wq)
  [mine] y = Attention <q_num_heads = 2, kv_num_heads = 2%s> (q, x, x) }"""
LINES: Final = (
    "Name: __mye8_0_myl0_0, LayerType: shape_call, Inputs: [], TacticName: , Metadata: ",
    "Name: _gemm_mha_v2, LayerType: kgen, Inputs: [], Metadata: [ONNX Layer: a][ONNX Layer: b]",
    "Name: _gemv_mha_v1, LayerType: kgen, Inputs: [], Metadata: [ONNX Layer: a]",
    "Name: __myl_MaxrSubExpSumDiv_myl1_6, LayerType: kgen, Metadata: [ONNX Layer: b]",
)


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx_bindings", reason="needs llmopt[tensorrt-rtx]")


def attention(options: str = "") -> Any:
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    made = bound(ATTENTION % options, {"wq": weight})
    LegalizeAttention().run(made)
    ConvertFloat("float16").run(made)
    return made


def test_engines_without_a_gpu_and_a_report_of_their_attentions(trt: Any, tmp_path: Path) -> None:
    backend = find_backend("tensorrt-rtx{sm=89;120}")

    lowered = backend.write(attention(), tmp_path, Demand(2))

    assert (tmp_path / "model.sm89.engine").stat().st_size > 10_000
    assert (tmp_path / "model.sm120.engine").stat().st_size > 10_000
    assert lowered.requires["sm"] == ["8.9", "12.0"]
    assert lowered.requires["tensorrt_rtx"] == trt.__version__
    report = json.loads((tmp_path / REPORT).read_text())
    for engine in report["engines"]:
        assert engine["attention"]["expected"] == engine["attention"]["fused"] == 1
        assert engine["attention"]["nodes"][0]["node"] == "mine"
        assert "mha" in engine["attention"]["nodes"][0]["layers"][0]
    assert any("1 of 1 attentions" in note for note in lowered.notes)


@pytest.mark.usefixtures("trt")
def test_an_attention_that_is_not_fused_says_why(tmp_path: Path) -> None:
    backend = find_backend("tensorrt-rtx")

    lowered = backend.write(attention(", softcap = 2.0"), tmp_path, Demand(2))

    node = json.loads((tmp_path / REPORT).read_text())["engines"][0]["attention"]["nodes"][0]
    assert node["node"] == "mine"
    assert "softcap" in node["reason"]
    assert any("0 of 1 attentions" in note and "softcap" in note for note in lowered.notes)


@pytest.mark.usefixtures("trt")
def test_a_network_that_the_parser_refuses_is_told_with_its_node(tmp_path: Path) -> None:
    made = program("main (float[B,4] x) => (float[B,4] y) { [bad] y = Abs (x) }")
    next(iter(made.graph)).op_type = "Det"

    with pytest.raises(UnsupportedModelError, match="bad"):
        find_backend("tensorrt-rtx").write(made, tmp_path, Demand(2))


def test_an_engine_that_cannot_be_built_says_what_tensorrt_said(trt: Any, tmp_path: Path) -> None:
    node = helper.make_node("Abs", ["x"], ["y"])
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", 4]) for n in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)]), tmp_path / "m")
    recipe = EngineRecipe("tensorrt_rtx", ("8.9",), (Profile("all"),))  # no bounds for B

    with pytest.raises(LlmoptError, match="could not build the engine"):
        build_engine(trt, tmp_path / "m", recipe, "8.9")


def test_layers_are_read_and_attentions_found_in_every_profile() -> None:
    layers = read_layers(LINES)

    found = attentions(layers, ["a", "b", "c"], {"d": "a softcap"}, profiles=2)

    assert [each.fused for each in found] == [True, False, False, False]
    assert found[0].layers == ("_gemm_mha_v2", "_gemv_mha_v1")
    assert "Maxr" in found[1].reason
    assert "no layer names it" in found[2].reason
    assert found[3].reason == "a softcap"
    told = summary("8.9", layers, found)["attention"]
    assert (told["expected"], told["fused"]) == (4, 1)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("tensorrt-rtx{sm=90}", "builds for 75;80;86;89;120;121"),
        ("tensorrt-rtx{sm=89;}", "sm="),
        ("tensorrt-rtx{dtype=float8}", "float16 or bfloat16"),
        ("tensorrt{chunk=0}", "1 token or more"),
        ("tensorrt{percentile=lots}", "expected int or float"),
        ("tensorrt{percentile=20}", "from 50 to 100"),
    ],
)
def test_options_that_cannot_be_are_refused(target: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        find_backend(target)


def test_float8_needs_a_gpu_that_has_it() -> None:
    backend = find_backend("tensorrt-rtx{sm=86}")

    assert backend.supports(parse_scheme("bf16")) is None
    reason = "no fp8 on sm=86; choose GPUs from sm=89 on"
    assert backend.supports(parse_scheme("fp8")) == reason
    reason = "no bf16 on sm=75; choose GPUs from sm=80 on"
    assert find_backend("tensorrt-rtx{sm=75}").supports(parse_scheme("bf16")) == reason


def test_a_missing_package_is_told_and_how_to_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tensorrt_build.MODULES, "tensorrt", ("no_such_tensorrt",))

    with pytest.raises(BackendUnavailableError, match="--defer-engine") as caught:
        find_backend("tensorrt").write(attention(), tmp_path, Demand(2))

    assert caught.value.exit_code == 3
    assert not list(tmp_path.iterdir())
    with pytest.raises(BackendUnavailableError, match="pip install tensorrt"):
        import_tensorrt("tensorrt", "tensorrt")


def test_a_package_that_cannot_be_loaded_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_tensorrt.py").write_text("raise OSError('libnvinfer.so.11: no such file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(tensorrt_build.MODULES, "tensorrt", ("broken_tensorrt",))

    with pytest.raises(BackendUnavailableError, match=r"libnvinfer\.so\.11"):
        import_tensorrt("tensorrt", "tensorrt")


def test_what_a_machine_lacks_is_listed() -> None:
    found = find_backend("tensorrt").available()

    if found.builds:
        assert "--defer-engine" in found.builds


def test_a_recipe_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    profile = Profile(
        "all", {"x": InputRange((1, 1), (1, 8), (2, 16))}, {"n": InputRange((1,), (1,), (4,))}
    )
    recipe = EngineRecipe("tensorrt", (), (profile,), tolerance=0.02)
    path = tmp_path / "build.json"
    path.write_text(recipe.to_json())

    assert EngineRecipe.load(path) == recipe


@pytest.mark.parametrize("text", ["", "[]", '{"package": "tensorrt", "profiles": [{}]}'])
def test_a_recipe_that_cannot_be_read_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "build.json"
    if text:
        path.write_text(text)

    with pytest.raises(ArtifactError):
        EngineRecipe.load(path)


@pytest.mark.usefixtures("trt")
def test_the_network_is_standard_onnx(tmp_path: Path) -> None:
    find_backend("tensorrt-rtx").write(attention(), tmp_path, Demand(2))

    onnx.checker.check_model(str(tmp_path / NETWORK))
