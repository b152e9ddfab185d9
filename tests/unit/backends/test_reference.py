"""The target ``reference``: the dialect in a file, run operator by operator, as its source does."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import bert
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support import tiny_sources
from support.programs import program
from support.schemes import scheme_of
from support.tiny_decoder import VOCABULARY, tiny_decoder
from support.traced import Traced

import llmopt
from llmopt.artifact.manifest import Manifest
from llmopt.backends import find_backend, reference
from llmopt.backends.base import Availability, Demand
from llmopt.backends.reference import ReferenceBackend
from llmopt.errors import ArtifactError, BackendUnavailableError, LlmoptError
from llmopt.ir.dialect import invariants, verify
from llmopt.ir.evaluator import Evaluator
from llmopt.ir.feeds import Case, feeds
from llmopt.passes.pipeline import Pipeline
from llmopt.runtime.engines.reference import ReferenceSession
from llmopt.runtime.selftest import selftest

pytestmark = pytest.mark.xdist_group("traced")  # once in one process

PROMPTS = [[5, 9, 11, 3, 8, 7], [4, 40]]
ALL_STEPS: dict[str, Any] = {"max_new_tokens": 8, "stop_tokens": ()}
INSTALL = "pip install 'llmopt[compile]'"


@pytest.fixture(scope="module")
def both(traced: Traced, tmp_path_factory: pytest.TempPathFactory) -> list[llmopt.Artifact]:
    """The tiny Llama for the reference and for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("both")
    return [traced.compiled(name, folder / name) for name in ("reference", "onnxruntime-cpu")]


@pytest.fixture(scope="module")
def llama(both: list[llmopt.Artifact]) -> llmopt.Artifact:
    """The tiny Llama as it is."""
    return both[0]


@pytest.fixture
def copy(llama: llmopt.Artifact, tmp_path: Path) -> Path:
    """A copy of the artifact that a test may damage."""
    return Path(shutil.copytree(llama.path, tmp_path / "copy"))


def test_the_artifact_is_the_program_in_the_dialect(llama: llmopt.Artifact) -> None:
    model = ir.load(llama.path / "model.onnx")

    assert {node.domain for node in model.graph} == {""}
    assert sum(node.op_type == "Attention" for node in model.graph) == tiny_sources.LAYERS
    assert verify(model) == []
    assert invariants(model) == []
    onnx.checker.check_model(llama.path / "model.onnx")
    assert {file.name for file in llama.path.iterdir()} >= {"model.onnx", "model.onnx.data"}
    assert llama.manifest.model.cache == "concat"
    assert llama.manifest.versions["onnx"] == onnx.__version__


def test_a_decoder_computes_what_its_source_computes(llama: llmopt.Artifact) -> None:
    runner = llmopt.load(llama)
    assert selftest(llama.path).passed
    ids = np.array(PROMPTS[:1])

    assert llama.manifest.verification["worst_error_rel"] <= 1e-5
    wanted = runner.logits(ids, prefill=6)
    for prefill in (1, 4):
        assert np.abs(runner.logits(ids, prefill=prefill) - wanted).max() <= 1e-5
    together = runner.generate_ids(PROMPTS, **ALL_STEPS)
    assert together == [runner.generate_ids(prompt, **ALL_STEPS) for prompt in PROMPTS]
    assert runner.run({"input_ids": ids})["logits"].shape == (1, 1, tiny_sources.VOCABULARY)


def test_it_writes_the_tokens_that_onnxruntime_writes(both: list[llmopt.Artifact]) -> None:
    written = [llmopt.load(each).generate_ids(PROMPTS, **ALL_STEPS) for each in both]

    assert written[0] == written[1]
    assert [len(row) for row in written[0]] == [8, 8]


SCHEMES = {
    "w8": 0.0,
    "w6": 0.0,
    "w4{block=16}": 0.0,
    "w8a8-dynamic": 5e-2,
    "fp16": 5e-3,
    "bf16": 4e-2,
}
"""What rounding activations may cost, of the largest logit."""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_activations_are_rounded_unless_they_are_to_be_exact(scheme: str, tmp_path: Path) -> None:
    backend, case = find_backend("reference"), Case(3, 7, 0, "left")
    made = tiny_decoder(keep=True)
    given = feeds(made.signature, case, VOCABULARY)
    low = Pipeline.parse(QUANTIZERS[scheme]).run(made.clone())

    entry = tmp_path / backend.write(low, tmp_path, Demand()).entry
    exact = backend.open(entry, exact=True)(given)
    rounded = backend.open(entry)(given)

    found, wanted = (each["logits"][case.mask() == 1] for each in (rounded, exact))
    assert found.dtype == wanted.dtype == np.float32
    apart = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert (apart > 0) == (SCHEMES[scheme] > 0)
    assert apart <= SCHEMES[scheme]
    narrow = {"fp16": "float16", "bf16": "bfloat16"}.get(scheme, "float32")
    assert rounded["present_key_0"].dtype.name == narrow
    assert exact["present_key_0"].dtype == np.float32


QUANTIZERS = {
    "w8": "quantize-weights{bits=8}",
    "w6": "quantize-weights{bits=6}",
    "w4{block=16}": "quantize-weights{bits=4,block=16}",
    "w8a8-dynamic": "quantize-dynamic",
    "fp16": "convert-float",
    "bf16": "convert-float{dtype=bfloat16}",
}


@pytest.mark.slow
def test_an_encoder_of_dynamic_int8_is_proven_and_does_not_mix_its_rows(tmp_path: Path) -> None:
    artifact = llmopt.compile(
        bert.make(), target="reference", output=tmp_path / "out", quantize="w8a8-dynamic"
    )

    assert artifact.manifest.verification["worst_error_rel"] <= 1e-5
    assert 0.99 < artifact.manifest.quality["cosine_mean"] < 1
    ids = np.random.default_rng(0).integers(0, bert.VOCABULARY, (5, 7))
    runner = llmopt.load(artifact)
    together = runner.run({"input_ids": ids})["last_hidden_state"]
    alone = runner.run({"input_ids": ids[4:]})["last_hidden_state"]
    assert np.abs(together[4:] - alone).max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4{block=16}", "bf16"])
def test_a_scheme_is_compiled_proven_and_generates(
    scheme: str, traced: Traced, tmp_path: Path
) -> None:
    artifact = traced.compiled("reference", tmp_path / "a", quantize=scheme)

    worst = artifact.manifest.verification["worst_error_rel"]
    assert worst <= find_backend("reference").tolerance(scheme_of(scheme))
    assert 0 <= artifact.manifest.quality["kl_mean"] < 1
    tokens = llmopt.load(artifact).generate_ids(PROMPTS, **ALL_STEPS)
    assert [len(row) for row in tokens] == [8, 8]


@pytest.mark.slow
def test_the_same_source_gives_the_same_bytes(
    llama: llmopt.Artifact, traced: Traced, tmp_path: Path
) -> None:
    again = llmopt.compile(traced.source, target="reference", output=tmp_path / "again")

    for name in ("manifest.json", "model.onnx", "model.onnx.data"):
        assert (llama.path / name).read_bytes() == (again.path / name).read_bytes(), name


def test_a_model_without_a_cache_runs_its_whole_prefix_again(tmp_path: Path) -> None:
    tiny_sources.bigram_file(tmp_path / "bigram.onnx")
    artifact = llmopt.compile(tmp_path / "bigram.onnx", target="reference", output=tmp_path / "out")
    runner = llmopt.load(artifact)
    ids = np.array([[1, 2, 3]])

    assert np.abs(runner.logits(ids, prefill=1) - runner.logits(ids)).max() <= 1e-6


def test_an_operator_without_an_evaluator_is_refused_before_any_work() -> None:
    made = program("main (float[B,4] x) => (float[B,4] y) { [odd] y = Relu (x) }")
    next(iter(made.graph)).op_type = "NoSuchOperator"

    assert ReferenceBackend().check(made) == ["onnx's evaluator has no NoSuchOperator ('odd')"]
    assert ReferenceBackend().check(tiny_decoder()) == []


def test_missing_packages_are_told_with_the_line_to_install_them(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    assert ReferenceBackend().available() == Availability()
    monkeypatch.setattr(importlib, "import_module", absent)
    monkeypatch.setattr(reference, "find_spec", lambda _: None)
    assert ReferenceBackend().available() == Availability(INSTALL, INSTALL)
    manifest = Manifest.read(copy)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'llmopt\[compile\]'") as caught:
        ReferenceSession(copy, manifest)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_damaged_file_is_an_error_of_the_artifact(name: str, copy: Path) -> None:
    file = copy / name
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        llmopt.load(copy)
    if name == "model.onnx":
        file.write_bytes(b"\xff" * len(content))
        with pytest.raises(ArtifactError, match="cannot be opened"):
            llmopt.load(copy)


def test_a_failing_run_is_an_error_of_ours(llama: llmopt.Artifact) -> None:
    session = llmopt.load(llama).session

    with pytest.raises(LlmoptError, match=r"input 'attention_mask' is missing"):
        session.run({"input_ids": np.ones((1, 3), np.int64)})


def test_types_are_widened_wherever_a_model_names_them() -> None:
    made = program(
        """main (float16[2] x) => (float16[2] y, float16[2] z)
        <int64[1] shape = {2}, float16[2] w = {1, 2}>
        { h = Constant <value = float16[2] {3, 4}> ()
          c = Cast <to = 1> (x)
          d = Cast <to = 10> (c)
          s = Add (d, w)
          y = Add (s, h)
          z = ConstantOfShape <value = float16[1] {5}> (shape) }"""
    )
    numbers = np.array([0.1, 0.3], np.float16)  # the text form holds bits of these types
    made.graph.initializers["w"].const_value = ir.tensor(numbers, name="w")

    reference.unround(made.model)

    found = Evaluator(made.model).run({"x": np.array([0.1, 0.2], np.float32)})
    assert {array.dtype.name for array in found.values()} == {"float32"}
    wanted = numbers.astype(np.float32) + np.array([0.1, 0.2], np.float32)
    np.testing.assert_allclose(found["y"], wanted, rtol=1e-5)
    assert {v.dtype for v in (*made.graph.inputs, *made.graph.outputs)} == {ir.DataType.FLOAT}
