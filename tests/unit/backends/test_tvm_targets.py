"""Compiling for TVM, end to end on tiny models, and what is refused."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bert
import numpy as np
import pytest
from support import tiny_sources
from support.bare_device import TVM, on_device
from support.programs import program
from support.tiny_artifacts import rewrite_manifest
from support.traced import Traced

import llmopt
from llmopt.backends.base import Demand
from llmopt.backends.tvm import TvmArm64, TvmCpu
from llmopt.backends.tvm.features import Features
from llmopt.benchmark import Generate
from llmopt.benchmark.profiling import profile
from llmopt.errors import (
    ArtifactError,
    BackendUnavailableError,
    UnknownNameError,
    UsageError,
)
from llmopt.runtime.cpu_features import processor_features
from llmopt.runtime.engines import tvm as engine
from llmopt.runtime.engines import tvm_runtime

pytestmark = pytest.mark.xdist_group("traced")  # once in one process

PROMPTS = [[5, 9, 11, 3, 8, 7], [4, 40]]
ALL_STEPS: dict[str, Any] = {"max_new_tokens": 12, "stop_tokens": ()}
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 machine")


@pytest.fixture(scope="module")
def llama(traced: Traced, tmp_path_factory: pytest.TempPathFactory) -> llmopt.Artifact:
    """The tiny Llama for this machine, unrounded."""
    return traced.compiled("tvm-cpu", tmp_path_factory.mktemp("tvm") / "llama")


@pytest.fixture
def copy(llama: llmopt.Artifact, tmp_path: Path) -> Path:
    """A copy of the artifact that a test may damage."""
    return Path(shutil.copytree(llama.path, tmp_path / "copy"))


def test_a_decoder_computes_what_its_source_computes(llama: llmopt.Artifact) -> None:
    runner = llmopt.load(llama)
    ids = np.array(PROMPTS[:1])

    assert llama.manifest.verification["worst_error_rel"] <= 1e-4
    tested = on_device(TVM, llama.path, "--selftest")  # not its compiler, and nothing else
    assert tested.returncode == 0, tested.stdout + tested.stderr
    wanted = runner.logits(ids, prefill=6)
    for prefill in (1, 4):
        assert np.abs(runner.logits(ids, prefill=prefill) - wanted).max() <= 1e-4
    together = runner.generate_ids(PROMPTS, **ALL_STEPS)
    assert together == [runner.generate_ids(prompt, **ALL_STEPS) for prompt in PROMPTS]
    assert len(together[1]) == 12


@pytest.mark.slow
def test_rounded_weights_are_proven_and_their_quality_measured(
    traced: Traced, tmp_path: Path
) -> None:
    artifact = traced.compiled("tvm-cpu", tmp_path / "out", quantize="w4{block=16,head=6}")

    assert artifact.manifest.verification["worst_error_rel"] <= 1e-4
    assert 0 < artifact.manifest.quality["kl_mean"] < 1
    index = json.loads((artifact.path / engine.INDEX).read_text())
    tables = [each for each in index["weights"] if "embed" in each["name"]]
    assert [each["dtype"] for each in tables] == ["int32", "float16"]  # head and lookup share one
    runner = llmopt.load(artifact)
    assert len(runner.generate_ids(PROMPTS[0], **ALL_STEPS)) == 12


@pytest.mark.slow
def test_weights_in_bfloat16_are_half_the_bytes_and_proven(
    traced: Traced, llama: llmopt.Artifact, tmp_path: Path
) -> None:
    artifact = traced.compiled("tvm-cpu", tmp_path / "out", quantize="bf16")

    assert artifact.manifest.precision == {"weights": "bf16"}
    assert artifact.manifest.verification["worst_error_rel"] <= 1e-5  # rounded alike
    assert 0 < artifact.manifest.quality["kl_mean"] < 1e-3
    index = json.loads((artifact.path / engine.INDEX).read_text())
    tables = [each["shape"] for each in index["weights"] if "embed" in each["name"]]
    assert tables == [[2, 16, 32]]  # 60 rows of 32, in pairs: head and lookup share one
    sizes = [(each.path / engine.WEIGHTS).stat().st_size for each in (artifact, llama)]
    assert sizes[0] < 0.55 * sizes[1]
    tokens = llmopt.load(artifact).generate_ids(PROMPTS[0], **ALL_STEPS)
    assert tokens == llmopt.load(llama).generate_ids(PROMPTS[0], **ALL_STEPS)


SCHEMES = [
    "w4{block=16}",
    *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in (None, "w8a8-dynamic")),
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_encoder_computes_what_its_source_computes(scheme: str | None, tmp_path: Path) -> None:
    artifact = llmopt.compile(
        bert.make(), target="tvm-cpu", output=tmp_path / "out", quantize=scheme, batch=2
    )

    assert artifact.manifest.verification["worst_error_rel"] <= 1e-4
    runner = llmopt.load(artifact)
    ids = np.random.default_rng(0).integers(0, bert.VOCABULARY, (5, 7))
    together = runner.run({"input_ids": ids})["last_hidden_state"]
    alone = runner.run({"input_ids": ids[4:]})["last_hidden_state"]
    assert together.shape[0] == 5
    assert np.abs(together[4:] - alone).max() <= 1e-5


def test_kernels_are_timed_by_the_modules_that_they_came_from(llama: llmopt.Artifact) -> None:
    prefill, decode = profile(llama.path, Generate(6, 3))

    for phase in (prefill, decode):
        modules = {each.module for each in phase.operators}
        assert {"embed_tokens", "layers.0.attention.qkv", "lm_head"} <= modules
        assert phase.attributed > 0.5  # of a model so small, the most is the machine's own
    assert (prefill.runs, decode.runs) == (3, 6)
    assert llmopt.load(llama).generate_ids(PROMPTS[0], max_new_tokens=2)


def test_a_long_prompt_goes_in_pieces(llama: llmopt.Artifact) -> None:
    ids = np.array(PROMPTS[:1])
    runner = llmopt.load(llama)
    wanted = runner.logits(ids)
    session: Any = runner.session
    session._library.limits = engine.Limits(batch=8, tokens=4)

    assert np.abs(runner.logits(ids) - wanted).max() <= 1e-5
    tokens = runner.generate_ids(PROMPTS[0], **ALL_STEPS)
    assert tokens == llmopt.load(llama).generate_ids(PROMPTS[0], **ALL_STEPS)


def test_more_sequences_than_it_was_built_for_are_refused(llama: llmopt.Artifact) -> None:
    with pytest.raises(UsageError, match=r"9 sequences.*built for 8.*--batch 9"):
        llmopt.load(llama).generate_ids([[5]] * 9, max_new_tokens=1)


def test_raw_inputs_and_outputs_have_the_dialects_names(llama: llmopt.Artifact) -> None:
    found = llmopt.load(llama).run({"input_ids": np.array(PROMPTS[:1])})

    assert found["logits"].shape == (1, 1, tiny_sources.VOCABULARY)
    assert found["present.1.value"].shape == (1, tiny_sources.GROUPS, 6, tiny_sources.WIDTH)


def test_weights_are_mapped_where_wide_vectors_like_them(llama: llmopt.Artifact) -> None:
    index = json.loads((llama.path / engine.INDEX).read_text())
    size = (llama.path / engine.WEIGHTS).stat().st_size

    assert index["weights"]
    assert all(each["offset"] % 64 == 0 for each in index["weights"])
    numbers = sum(tensor.nbytes for tensor in tiny_sources.tensors().values())
    assert size < 1.7 * numbers  # rows of 60 fill tiles of 32; nothing is stored twice


@pytest.mark.slow
def test_the_same_source_gives_the_same_bytes(
    llama: llmopt.Artifact, traced: Traced, tmp_path: Path
) -> None:
    again = llmopt.compile(traced.source, target="tvm-cpu", output=tmp_path / "again", verify="off")

    for name in ("model.so", engine.WEIGHTS, engine.INDEX):
        files = [(folder / name).read_bytes() for folder in (llama.path, again.path)]
        assert hashlib.sha256(files[0]).digest() == hashlib.sha256(files[1]).digest(), name


def test_running_needs_no_compiler_and_no_torch(llama: llmopt.Artifact) -> None:
    code = (
        "import sys, llmopt; llmopt.load(sys.argv[1]).generate_ids([5, 9], max_new_tokens=2);"
        "print({'tvm', 'torch', 'onnx', 'onnx_ir'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(llama.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "set()"


def test_a_processor_without_a_feature_is_refused(copy: Path) -> None:
    rewrite_manifest(copy, requires={"machine": platform.machine(), "cpu_features": ["amx_no"]})
    with pytest.raises(BackendUnavailableError, match=r"lacks amx_no; compile.*mcpu=") as caught:
        llmopt.load(copy)
    assert caught.value.exit_code == 3

    rewrite_manifest(copy, requires={"machine": "vax"})
    with pytest.raises(BackendUnavailableError, match="code for vax"):
        llmopt.load(copy)


def test_a_missing_runtime_is_an_error_with_the_line_to_install_it(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tvm_runtime, "find_spec", lambda _: None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'llmopt\[runtime-tvm\]'"):
        llmopt.load(copy)


@pytest.mark.parametrize("name", ["model.so", engine.INDEX])
def test_a_damaged_file_is_named(name: str, copy: Path) -> None:
    file = copy / name
    file.write_bytes(bytes(file.stat().st_size))

    with pytest.raises(ArtifactError, match=name):
        llmopt.load(copy)


def test_another_artifact_in_the_same_place_is_opened_anew(copy: Path, tmp_path: Path) -> None:
    earlier = llmopt.load(copy)
    wanted = earlier.logits(PROMPTS[:1])
    tiny_sources.bigram_file(tmp_path / "bigram.onnx")
    llmopt.compile(tmp_path / "bigram.onnx", target="tvm-cpu", output=copy, force=True)

    later = llmopt.load(copy)

    ids = np.array([[1, 2, 3]])
    found = later.run({"input_ids": ids})
    assert [array.shape[:2] for array in found.values()] == [ids.shape]
    assert np.array_equal(earlier.logits(PROMPTS[:1]), wanted)


def test_weights_cut_short_are_an_error(copy: Path) -> None:
    (copy / engine.WEIGHTS).write_bytes(bytes(64))
    with pytest.raises(ArtifactError, match=engine.WEIGHTS):
        engine.TvmLibrary(copy / "model.so")


def test_operators_without_a_kernel_are_listed_together() -> None:
    made = program(
        """main (float[B,4] x) => (float[B,4] y, float[B,4] z)
    { [odd] y = Relu (x)\n [strange] z = Relu (x) }"""
    )
    for node in made.graph:
        node.op_type = "NoSuchOperator"

    assert TvmCpu().check(made) == [
        "no kernel for NoSuchOperator ('odd')",
        "no kernel for NoSuchOperator ('strange')",
    ]


@needs_x86
def test_a_processor_is_this_one_or_the_one_named() -> None:
    own = TvmCpu().processor()

    assert set(own.required) <= processor_features()
    assert own.features.avx2 == ("avx2" in processor_features())
    assert TvmCpu(mcpu="haswell").processor().features == Features(avx2=True)
    bare = TvmCpu(mcpu="sapphirerapids", without="amx-tile+avx512vnni").processor()
    assert bare.features.avx512
    assert not bare.features.avx512vnni
    assert not bare.features.amx_int8
    assert bare.target["mattr"] == ["-amx-tile", "-avx512vnni"]
    with pytest.raises(UnknownNameError, match="did you mean 'haswell'"):
        TvmCpu(mcpu="haswel").processor()
    with pytest.raises(UnknownNameError, match="unknown processor feature 'avx3'"):
        TvmCpu(without="avx3").processor()
    assert TvmCpu().proxy_backend() is None
    assert TvmCpu(mcpu="diamondrapids").proxy_backend() == TvmCpu()


def test_arm64_is_compiled_and_linked_on_any_machine(tmp_path: Path) -> None:
    made = program("main (float[B,4] x) => (float[B,4] y) { y = Relu (x) }")
    backend = TvmArm64(mcpu="cortex-a76")
    lowered = backend.write(made, tmp_path, Demand())

    assert (tmp_path / lowered.entry).read_bytes()[18] == 183  # ELF's number of aarch64
    assert lowered.requires["machine"] == "aarch64"
    assert "asimddp" in lowered.requires["cpu_features"]
    assert backend.processor().features == Features(neon=True, dotprod=True)


def test_threads_that_share_an_artifact_get_what_each_gets_alone(llama: llmopt.Artifact) -> None:
    runner = llmopt.load(llama, threads=1)
    prompts = [[5 + i] * (4 + 3 * i) for i in range(3)]

    def generated(prompt: list[int]) -> list[int]:
        return runner.generate_ids(prompt, max_new_tokens=12, stop_tokens=[])

    alone = [generated(prompt) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            assert list(pool.map(generated, prompts)) == alone


FORKS = """
import os, sys
import llmopt
runner = llmopt.load(sys.argv[1], threads=2)
runner.generate_ids([5, 6, 7], max_new_tokens=2)
child = os.fork()
if child == 0:
    try:
        runner.generate_ids([5, 6, 7], max_new_tokens=2)
    except llmopt.LlmoptError as error:
        print(error, flush=True)
        os._exit(3)
    os._exit(0)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_is_refused_and_does_not_hang(llama: llmopt.Artifact) -> None:
    line = [sys.executable, "-W", "ignore", "-c", FORKS, str(llama.path)]
    child = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)

    assert child.returncode == 3, child.stderr
    assert "loaded before this process was forked" in child.stdout
