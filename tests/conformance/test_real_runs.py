"""Real models on this machine: whose time a run takes, and how much memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from support import real_models
from support.traced import Traced

from llmopt.benchmark import Encode, Generate, Workload
from llmopt.benchmark.profiling import profile

pytestmark = pytest.mark.slow

TARGETS: Final = ("onnxruntime-cpu", "tvm-cpu")
WORKLOADS: Final[dict[str, Workload]] = {"smollm2": Generate(64, 8), "minilm": Encode(4, 64)}
LAYERS: Final = {"smollm2": 30, "minilm": 6}
AT_REST: Final = 120e6
"""Bytes that Python, numpy, the tokenizer and an engine may take without a model."""
_MEASURED: Final = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "llmopt.runtime", *sys.argv[1:]], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""
"""A process between: what is started by a large one counts its memory as its own."""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model for every target, traced once: ``smollm2/onnxruntime-cpu`` and so on."""
    work = tmp_path_factory.mktemp("real")
    made: dict[str, tuple[Any, str]] = {
        "smollm2": (real_models.smollm2_gguf, "w4"),
        "minilm": (real_models.minilm_folder, "w8a8-dynamic"),
    }
    for name, (source, scheme) in made.items():
        traced = Traced.of(source())
        for target in TARGETS:
            traced.compiled(target, work / name / target, quantize=scheme, verify="off")
    return work


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", WORKLOADS)
def test_time_of_real_models_belongs_to_their_modules(
    artifacts: Path, model: str, target: str
) -> None:
    tries = [profile(artifacts / model / target, WORKLOADS[model]) for _ in range(3)]

    for phases in zip(*tries, strict=True):  # what else runs takes time between kernels, too
        assert max(phase.attributed for phase in phases) >= 0.95
        assert all(len(phase.to_dict()["by_layer"]) == LAYERS[model] for phase in phases)


@pytest.mark.parametrize(("target", "copies"), [("onnxruntime-cpu", 2), ("tvm-cpu", 1)])
def test_a_run_takes_little_more_memory_than_its_files(
    artifacts: Path, target: str, copies: int
) -> None:
    """ONNX Runtime arranges weights anew for its kernels; TVM maps them as they are."""
    artifact = artifacts / "smollm2" / target
    files = json.loads((artifact / "manifest.json").read_text())["files"]
    size = sum(file["size_bytes"] for file in files)
    line = [sys.executable, "-c", _MEASURED, artifact, "--prompt", "The sky is"]

    done = subprocess.run(
        [*map(str, line), "--max-new-tokens", "32"], capture_output=True, text=True, check=True
    )

    text, peak = done.stdout.rsplit("\n", 2)[:2]
    assert text.strip()
    assert size < int(peak) <= copies * size + AT_REST
