"""Real models become engines for two generations of GPUs, and their attentions are one layer each.

Nothing runs on a GPU here: the typed network is compared with the source while it is compiled, and
the report of the engine's layers is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import real_models
from support.traced import Traced

from llmopt.compiler import Artifact

pytestmark = pytest.mark.slow

FUSED = 0.9  # the least part of the attentions that are one layer


@pytest.fixture(autouse=True)
def _tensorrt() -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs llmopt[tensorrt-rtx]")


@pytest.fixture(scope="module")
def minilm() -> Traced:
    return Traced.of(real_models.minilm_folder())


@pytest.fixture(scope="module")
def smollm2() -> Traced:
    return Traced.of(real_models.smollm2_gguf(), max_length=48)


def compiled(traced: Traced, folder: Path, **options: Any) -> Artifact:
    """Return the artifact for RTX 40 and RTX 50."""
    return traced.compiled("tensorrt-rtx{sm=89;120}", folder / "artifact", **options)


def check(artifact: Artifact, attentions: int) -> None:
    """Assert that both engines are there, fused, and proven as far as they can be."""
    names = {file.path for file in artifact.manifest.files}
    assert {"model.sm89.engine", "model.sm120.engine", "network.onnx"} <= names
    assert artifact.manifest.requires["sm"] == ["8.9", "12.0"]
    assert artifact.manifest.verification["status"] == "passed"
    assert "the engine itself was not run" in artifact.manifest.verification["proven_by"]
    report = json.loads((artifact.path / "engine-report.json").read_text())
    for engine in report["engines"]:
        found = engine["attention"]
        assert found["expected"] == attentions
        assert found["fused"] >= FUSED * attentions
        assert all(node["layers"] or node["reason"] for node in found["nodes"])


@pytest.mark.parametrize(
    ("scheme", "worst", "cosine"),
    [
        # error against the source with its weights rounded alike; cosine of what users get
        pytest.param("fp16", 5e-3, 0.9999, id="fp16"),
        pytest.param("w8a8", 1e-2, 0.99, id="int8"),
        pytest.param("fp8", 1e-2, 0.99, id="fp8"),
    ],
)
def test_minilm(scheme: str, worst: float, cosine: float, minilm: Traced, tmp_path: Path) -> None:
    artifact = compiled(minilm, tmp_path, quantize=scheme)

    check(artifact, 6)
    assert artifact.manifest.verification["worst_error_rel"] <= worst
    assert artifact.manifest.quality["cosine_mean"] >= cosine


@pytest.mark.parametrize(
    ("scheme", "worst", "kl"),
    [
        pytest.param("fp16", 1e-2, 1e-4, id="fp16"),
        pytest.param("w4", 1e-2, 0.6, id="w4", marks=pytest.mark.thorough),
    ],
)
def test_smollm2(scheme: str, worst: float, kl: float, smollm2: Traced, tmp_path: Path) -> None:
    artifact = compiled(smollm2, tmp_path, quantize=scheme, batch=2)

    check(artifact, 30)
    assert artifact.manifest.verification["worst_error_rel"] <= worst
    assert artifact.manifest.quality["kl_mean"] <= kl
