"""TVM for CUDA: every kernel is scheduled and compiled; what it computes is run without a GPU."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from support import tiny_sources
from support.programs import bound, defined, error_rel, inputs, program
from support.schemes import scheme_of
from support.tiny_artifacts import rewrite_manifest
from support.tiny_decoder import TEXT, VOCABULARY, tiny_decoder

import llmopt
from llmopt.artifact.manifest import Manifest
from llmopt.backends import find_backend
from llmopt.backends.base import TOLERANCE, Availability, Demand
from llmopt.backends.tvm import api, cuda, cuda_build
from llmopt.backends.tvm.cuda import TvmCuda, Unscheduled
from llmopt.backends.tvm.cuda_module import CudaModule
from llmopt.backends.tvm.entries import Capacity
from llmopt.errors import ArtifactError, BackendUnavailableError, LlmoptError, UsageError
from llmopt.ir.evaluator import Evaluator
from llmopt.ir.feeds import Case
from llmopt.ir.program import Program
from llmopt.passes.pipeline import Pipeline
from llmopt.runtime.engines import tvm_cuda

pytestmark = pytest.mark.xdist_group("cuda")  # its decoder is compiled once
TARGET = cuda_build.target_of("sm_80", "x86_64")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc (the CUDA toolkit)")
ENCODER = """main (int64[B,S] input_ids, int64[B,S] attention_mask) => (float[B,S,32] y)
<int64[2] i12 = {1,2}, int64[3] parts = {32,32,32}>
{  real2 = Cast <to = 9> (attention_mask)
   [padding_mask] real = Unsqueeze (real2, i12)
   x = Gather (table, input_ids)
   normed = LayerNormalization <axis = -1> (x, scale, shift)
   qkv = MatMul (normed, w)
   q, k, v = Split <axis = -1> (qkv, parts)
   a = Attention <q_num_heads = 4, kv_num_heads = 4> (q, k, v, real)
   sum = Add (x, a)
   up = MatMul (sum, o)
   bent = Gelu (up)
   y = LayerNormalization <axis = -1> (bent, scale)
}"""


def encoder() -> Program:
    """Return a layer of an encoder."""
    rng = np.random.default_rng(8)
    shapes = {
        "table": (VOCABULARY, 32),
        "scale": (32,),
        "shift": (32,),
        "w": (32, 96),
        "o": (32, 32),
    }
    arrays = {name: rng.standard_normal(shape, np.float32) / 3 for name, shape in shapes.items()}
    extra = ", ".join(f"float[{','.join(map(str, s))}] {n}" for n, s in shapes.items())
    return bound(ENCODER.replace("attention_mask)", f"attention_mask, {extra})", 1), arrays)


def half(made: Program) -> Program:
    return Pipeline.parse("convert-float").run(made)


def decoder() -> Program:
    return tiny_decoder(keep=True)


MODELS: dict[str, Callable[[], Program]] = {
    "decoder": decoder,
    "decoder fp16": lambda: half(decoder()),
    "encoder": encoder,
    "encoder fp16": lambda: half(encoder()),
}


@pytest.mark.parametrize(
    "name",
    ["encoder", *(pytest.param(n, marks=pytest.mark.thorough) for n in MODELS if n != "encoder")],
)
def test_every_kernel_is_scheduled_for_a_gpu(name: str) -> None:
    module = CudaModule(MODELS[name](), Capacity(8, 64)).convert()

    kernels = api.kernels(api.fused(module, TARGET))

    assert len(kernels) > 10
    assert [name for name, text in kernels.items() if "threadIdx.x" not in text] == []
    assert [name for name, text in kernels.items() if "blockIdx.x" not in text] == []


@pytest.mark.parametrize("name", ["encoder fp16"])
def test_cuda_source_is_generated_without_a_gpu(name: str) -> None:
    module = CudaModule(MODELS[name](), Capacity(8, 64)).convert()

    source = api.device_source(api.compiled(module, TARGET))

    assert source.count("__global__") >= len(api.kernels(api.fused(module, TARGET)))
    assert ("half" in source) == ("fp16" in name)


def written(made: Program, folder: Path) -> tvm_cuda.DeviceLibrary:
    """Return a Program as the module of the target, compiled for this processor."""
    lowered = Unscheduled().write(made, folder, Demand())
    return tvm_cuda.DeviceLibrary(folder / lowered.entry, "cpu")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny decoder as an artifact for CUDA, with functions for this processor in it."""
    folder, made = tmp_path_factory.mktemp("cuda"), decoder()
    Unscheduled().write(made, folder, Demand())
    manifest = Manifest(
        target="tvm-cuda",
        entry="model.so",
        task="generate",
        signature=made.signature,
        model=made.facts.model,
    )
    manifest.with_files(folder).write(folder)
    return folder


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact that a test may damage."""
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


@pytest.fixture
def runner(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A runner of the artifact that takes this processor for a GPU."""
    _pretend(monkeypatch)
    return llmopt.load(artifact)


def _pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = tvm_cuda.DeviceLibrary
    monkeypatch.setattr(tvm_cuda, "lacking", lambda: "")
    monkeypatch.setattr(tvm_cuda, "DeviceLibrary", lambda entry, _: opened(entry, "cpu"))


THOROUGH_HALF = pytest.param("decoder fp16", 1e-2, marks=pytest.mark.thorough)
THOROUGH_ENCODER = pytest.param("encoder fp16", 1e-2, marks=pytest.mark.thorough)


@pytest.mark.parametrize(("name", "tolerance"), [("decoder", 1e-5), THOROUGH_HALF])
def test_a_decoder_computes_what_the_reference_computes(
    name: str, tolerance: float, tmp_path: Path
) -> None:
    made = MODELS[name]()
    library, reference = written(made, tmp_path), Evaluator(made.model)

    assert library.functions == {"prefill", "score", "decode"}
    cases = [Case(3, 7, 0, "left"), Case(3, 5, 6, "left"), Case(2, 1, 4), Case(1, 7, 0)]
    for case in cases:
        real = case.mask()[:, case.past :] == 1
        for keep in (0, 1, 3):
            given = inputs(made, case, VOCABULARY) | {"logits_to_keep": np.asarray(keep)}
            found, wanted = library.run(given), reference.run(given)
            last = real if keep == 0 else real[:, -keep:]
            assert error_rel(found["logits"], wanted["logits"], last) <= tolerance, case.label
        present = found["present_key_0"]
        assert present.dtype == wanted["present_key_0"].dtype
        assert np.abs(present - wanted["present_key_0"]).max() <= 20 * tolerance


@pytest.mark.parametrize(("name", "tolerance"), [("encoder", 1e-5), THOROUGH_ENCODER])
def test_an_encoder_computes_what_the_reference_computes(
    name: str, tolerance: float, tmp_path: Path
) -> None:
    made = MODELS[name]()
    library, reference = written(made, tmp_path), Evaluator(made.model)

    for side in ("none", "left", "right"):
        case = Case(3, 7, 0, side)
        given = inputs(made, case, VOCABULARY)
        found, wanted = library.run(given)["y"], reference.run(given)["y"]
        assert error_rel(found, wanted, case.mask() == 1) <= tolerance, case.label


SPELLED = {
    "window, cap, scale": (
        "is_causal = 1",
        "is_causal=1, left_window_size=2, softcap=1.5, scale=0.5",
    ),
    "two windows and no mask": (
        "<is_causal = 1, q_num_heads = 2, kv_num_heads = 1> (qr, kr, v, real",
        "<left_window_size=3, right_window_size=1, q_num_heads=2, kv_num_heads=1> (qr, kr, v, ",
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", SPELLED)
def test_every_form_of_attention_is_written(name: str, tmp_path: Path) -> None:
    old, new = SPELLED[name]
    assert old in TEXT
    made = tiny_decoder(text=TEXT.replace(old, new))
    case = Case(2, 5, 4, "left")
    given = inputs(made, case, VOCABULARY)

    found, wanted = written(made, tmp_path).run(given), Evaluator(made.model).run(given)

    real = case.mask()[:, case.past :] == 1
    assert error_rel(found["logits"], wanted["logits"], real) <= 1e-5


def test_sizes_additive_masks_and_partial_rotation_are_written(tmp_path: Path) -> None:
    made = program(
        """main (float[B,S,32] x, float[B,S,4] cos, float[B,S,4] sin, float[S,S] shown)
        => (float[B,S,32] y, float[2] size, float[1] tokens, int64[B,S] places)
        <int64 zero = {0}, int64 one = {1}, int64[1] first = {1}, int64[1] end = {2}>
        { t = RotaryEmbedding <num_heads = 2, rotary_embedding_dim = 8> (x, cos, sin)
          y = Attention <q_num_heads = 2, kv_num_heads = 2> (t, t, x, shown)
          both = Shape <end = 2> (x)
          size = Cast <to = 1> (both)
          second = Slice (both, first, end)
          tokens = Cast <to = 1> (second)
          count = Gather (both, one)
          row = Range (zero, count, one)
          places = Expand (row, both) }"""
    )
    rng = np.random.default_rng(9)
    shapes = {"x": (2, 5, 32), "cos": (2, 5, 4), "sin": (2, 5, 4)}
    given = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    given["shown"] = np.where(np.tri(5) > 0, 0, -np.inf).astype(np.float32)

    found, wanted = written(made, tmp_path).run(given), Evaluator(made.model).run(given)

    assert found["size"].tolist() == [2.0, 5.0]
    assert found["tokens"].tolist() == [5.0]
    assert np.array_equal(found["places"], wanted["places"])
    assert error_rel(found["y"], wanted["y"]) <= 1e-5


@pytest.mark.thorough
def test_a_decoder_that_takes_no_mask_counts_its_tokens(tmp_path: Path) -> None:
    text = TEXT.replace(" int64[B,T] attention_mask,", "").replace("v, real, past", "v, , past")
    text = text.replace("   real2 = Cast <to = 9> (attention_mask)\n", "")
    made = tiny_decoder(text=text.replace("   [padding_mask] real = Unsqueeze (real2, i12)\n", ""))
    given = inputs(made, Case(2, 5, 4), VOCABULARY)

    found, wanted = written(made, tmp_path).run(given), Evaluator(made.model).run(given)

    assert error_rel(found["logits"], wanted["logits"]) <= 1e-5


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_tiny_models_of_families_are_scheduled_and_right(family: str, tmp_path: Path) -> None:
    config = tiny_sources.CONFIG | {"model_type": family}
    if family == "bert":
        config |= {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    made = Pipeline.parse("default").run(defined(config))

    module = CudaModule(made.clone(), Capacity(8, 64)).convert()
    kernels = api.kernels(api.fused(module, TARGET))
    library, reference = written(made, tmp_path), Evaluator(made.model)

    assert TvmCuda().check(made) == []
    assert all("threadIdx.x" in text for text in kernels.values())
    case = Case(3, 7, 0, "left")
    given = inputs(made, case, tiny_sources.VOCABULARY)
    (name, *_) = library.run(given)
    error = error_rel(library.run(given)[name], reference.run(given)[name], None)
    assert error <= 1e-4


@pytest.mark.thorough
@needs_nvcc
@pytest.mark.parametrize("scheme", [None, "fp16"])
def test_a_model_is_compiled_by_nvcc_and_proven_on_the_processor(
    scheme: str | None, tmp_path: Path
) -> None:
    source = tiny_sources.llama_folder(tmp_path / "llama")

    artifact = llmopt.compile(source, target="tvm-cuda", output=tmp_path / "a", quantize=scheme)

    manifest = artifact.manifest
    kernels = (artifact.path / tvm_cuda.KERNELS).read_bytes()
    assert b"\x7fELF" in kernels
    assert len(kernels) > 10_000
    assert manifest.requires["cuda_arch"] == "sm_80"
    assert manifest.model.cache == "concat"
    assert manifest.verification["worst_error_rel"] <= TvmCuda().tolerance(scheme_of(scheme))
    if tvm_cuda.lacking():
        assert "no kernel was run" in manifest.verification["proven_by"]
        with pytest.raises(BackendUnavailableError, match="NVIDIA GPU and its driver") as caught:
            llmopt.load(artifact)
        assert caught.value.exit_code == 3


def test_what_compiles_cuda_is_told_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    source = tiny_sources.bigram_file(tmp_path / "bigram.onnx")

    with pytest.raises(BackendUnavailableError, match=r"needs nvcc on the PATH.*NVRTC") as caught:
        llmopt.compile(source, target="tvm-cuda", output=tmp_path / "out")

    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    assert "nvcc" in TvmCuda().available().builds
    monkeypatch.setattr(cuda_build, "find_spec", lambda _: object())
    monkeypatch.setenv("CUDA_PATH", "/usr/local/cuda")
    assert cuda_build.compiler() == "nvrtc"


def test_kernels_that_do_not_compile_are_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> bytes:
        raise RuntimeError("source\nnvcc fatal: Unsupported gpu architecture 'compute_10'")

    monkeypatch.setattr(cuda_build, "compiler", lambda: "nvcc")
    monkeypatch.setattr(api, "cuda_binary", fail)
    made = program("main (float[B,4] x) => (float[B,4] y) { y = Relu (x) }")

    with pytest.raises(LlmoptError, match=r"nvcc could not compile.*Unsupported gpu architecture"):
        TvmCuda().write(made, tmp_path, Demand())


def test_operators_without_a_rule_are_listed_together() -> None:
    made = program(
        """main (float[B,2,S,4] q, float[B,4] x) => (float[B,2,S,4] y, float[B,4] z)
    { [heads] y = Attention (q, q, q)\n [odd] z = Relu (x) }"""
    )
    list(made.graph)[1].op_type = "NoSuchOperator"
    turned = program(
        """main (float[B,S,8] x, float[9,2] c, int64[B,S] p) => (float[B,S,8] y)
    { [odd] y = RotaryEmbedding <num_heads = 2, interleaved = 1> (x, c, c, p) }"""
    )

    assert TvmCuda().check(made) == [
        "Attention ('heads') reads heads of their own axis",
        "no kernel for NoSuchOperator ('odd')",
    ]
    assert TvmCuda().check(turned) == ["RotaryEmbedding ('odd') is interleaved"]


def test_what_was_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_build, "compiler", lambda: "nvcc")
    monkeypatch.setattr(tvm_cuda, "lacking", lambda: "a GPU")
    here = TvmCuda()
    assert here.proxy_backend() == Unscheduled()
    assert here.proven_by.endswith("no kernel was run")
    assert here.available() == Availability(runs="a GPU")
    assert here.resolved(decoder(), None) == (here, ())
    assert (here.tolerance(scheme_of("fp16")), here.tolerance(None)) == (2e-2, TOLERANCE)

    monkeypatch.setattr(tvm_cuda, "lacking", lambda: "")
    assert here.proxy_backend() is None
    assert here.proven_by == ""
    monkeypatch.setattr(cuda, "find_spec", lambda _: None)
    assert "llmopt[cpu]" in here.available().builds


def test_an_architecture_is_one_of_nvidias() -> None:
    assert find_backend("tvm-cuda{arch=sm_89}") == TvmCuda(arch="sm_89")
    for wrong in ("80", "sm_", "gfx90"):
        with pytest.raises(UsageError, match="write sm_80"):
            TvmCuda(arch=wrong)


def test_a_cache_is_kept_on_the_device_from_step_to_step(runner: Any) -> None:
    ids = np.array([[5, 9, 1, 3, 8, 7], [4, 0, 2, 2, 1, 6]])

    whole = runner.logits(ids)
    for prefill in (1, 4):
        assert np.abs(runner.logits(ids, prefill=prefill) - whole).max() <= 1e-5
    found = Evaluator(tiny_decoder().model).run(
        {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.tile(np.arange(6), (2, 1)),
            **{f"past_{n}_0": np.zeros((2, 1, 0, 16), np.float32) for n in ("key", "value")},
        }
    )
    assert error_rel(whole, found["logits"]) <= 1e-5
    assert runner.run({"input_ids": ids})["logits"].shape == (2, 1, VOCABULARY)
    assert len(runner.generate_ids([5, 9], max_new_tokens=4, stop_tokens=())) == 4


def test_a_failing_call_is_an_error_of_ours(runner: Any) -> None:
    with pytest.raises(LlmoptError, match="input 'attention_mask' is missing"):
        runner.session.run({"input_ids": np.ones((1, 3), np.int64)})
    given = runner.session.library
    feeds = {port.name: np.ones((1, 2), np.int64) for port in given.signature.inputs[:3]}
    feeds |= {port.name: np.ones((1, 1, 1, 5), np.float32) for port in given.signature.inputs[3:5]}
    with pytest.raises(LlmoptError, match="tvm could not run 'score'"):
        given.call(feeds, every=True)


@pytest.mark.parametrize("name", ["model.so", "model.json", "weights.bin"])
def test_a_damaged_file_is_named(name: str, copy: Path) -> None:
    (copy / name).write_bytes(b"" if name == "weights.bin" else bytes(80))

    with pytest.raises(ArtifactError, match=name):
        tvm_cuda.DeviceLibrary(copy / "model.so", "cpu")


def test_what_a_machine_lacks_is_told(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing := tvm_cuda.lacking():
        with pytest.raises(BackendUnavailableError, match=missing):
            llmopt.load(copy)
        with pytest.raises(BackendUnavailableError, match=missing):
            tvm_cuda.DeviceLibrary(copy / "model.so", "cuda")
    _pretend(monkeypatch)
    rewrite_manifest(copy, requires={"machine": "vax"})
    with pytest.raises(BackendUnavailableError, match="host code is for vax"):
        llmopt.load(copy)
    rewrite_manifest(copy, requires={"cuda_arch": "sm_80"})
    with pytest.raises(BackendUnavailableError, match=r"compute capability .*need 8\.0"):
        llmopt.load(copy)
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'llmopt\[runtime-tvm\]'"):
        llmopt.load(copy)


def test_a_gpu_older_than_the_kernels_is_refused() -> None:
    tvm_cuda.check_capability("9.0", {"cuda_arch": "sm_80"})
    tvm_cuda.check_capability("8.0", {"cuda_arch": "sm_80"})
    tvm_cuda.check_capability("12.0", {"cuda_arch": "sm_90"})
    with pytest.raises(BackendUnavailableError, match=r"capability 7\.5.*arch=sm_75") as caught:
        tvm_cuda.check_capability("7.5", {"cuda_arch": "sm_80"})
    assert caught.value.exit_code == 3


def test_no_driver_and_no_package_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", absent)
    assert tvm_cuda.lacking() == "an NVIDIA GPU and its driver"
    monkeypatch.setattr(tvm_cuda, "find_spec", lambda _: None)
    assert "pip install" in tvm_cuda.lacking()


def test_compiled_kernels_are_found_by_their_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def compiled(code: str) -> bytes:
        asked.append(code)
        return b"new"

    before = tvm_ffi.get_global_func("tvm_callback_cuda_compile", allow_missing=True)
    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compiled, override=True)
    known: dict[str, bytes] = {}
    monkeypatch.setattr(tvm_cuda, "_known_kernels", lambda: known)
    (tmp_path / "k").write_bytes(b"compiled")
    try:
        tvm_cuda._register(hashlib.sha256(b"source").hexdigest(), tmp_path / "k")
        find = tvm_ffi.get_global_func("tvm_callback_cuda_compile")
        assert bytes(find("source")) == b"compiled"
        assert bytes(find("other")) == b"new"
    finally:
        if before is not None:
            tvm_ffi.register_global_func("tvm_callback_cuda_compile", before, override=True)
    assert asked == ["other"]
    with pytest.raises(ArtifactError, match="no-such"):
        tvm_cuda._register("", tmp_path / "no-such")
