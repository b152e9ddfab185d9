"""Compiling, end to end, on sources of a few kilobytes."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import gpt
import numpy as np
import pytest
import torch
from support import tiny_sources
from support.traced import Traced
from torch import Tensor, nn
from typing_extensions import override

import llmopt
from llmopt.errors import AccuracyError, FusionError, SourceError, UsageError
from llmopt.runtime.selftest import selftest

pytestmark = pytest.mark.xdist_group("traced")  # once in one process


def digests(folder: Path) -> dict[str, str]:
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    files.pop("build-report.json")
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def test_the_same_source_gives_the_same_bytes(traced: Traced, tmp_path: Path) -> None:
    scheme = "w4{block=16}"
    made = [
        llmopt.compile(traced.source, output=tmp_path / f"out{number}", quantize=scheme)
        for number in range(2)
    ]

    assert digests(made[0].path) == digests(made[1].path)
    assert made[0].manifest.verification["status"] == "passed"
    assert made[0].manifest.verification["worst_error_rel"] <= 1e-3
    assert made[0].manifest.quality["kl_mean"] > 0
    tested = selftest(made[0].path)
    assert tested.passed
    assert [check.name for check in tested.checks] == ["files", "tokenizer", "logits", "best token"]
    # 2 rows of 16 tokens, less 3 of padding and 1 that may be off; 32 likeliest and 60 others
    assert tested.checks[2].compared == 28 * 92


def test_quality_past_the_bound_is_an_error_and_leaves_nothing(
    traced: Traced, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(AccuracyError, match="mean KL divergence"):
        traced.compiled("onnxruntime-cpu", out, quantize="w4{block=16}", max_kl=1e-9)

    assert not out.exists()
    with pytest.raises(UsageError, match="give --quantize too"):
        llmopt.compile(traced.source, output=out, max_kl=1.0)


def test_weights_that_do_not_fit_the_config_are_named(tmp_path: Path) -> None:
    source = tiny_sources.llama_folder(tmp_path / "llama", intermediate_size=40)

    with pytest.raises(SourceError, match=r"6 tensors do not fit.*gate_proj.*\[48, 32\], not"):
        llmopt.compile(source, output=tmp_path / "out")


class Spoiled(gpt.Attention):
    """Attention whose scores pass through something that no attention has."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            part.view(batch, tokens, gpt.HEADS, gpt.WIDTH).transpose(1, 2)
            for part in self.qkv(x).split(gpt.HIDDEN, dim=-1)
        )
        scores = torch.relu(q @ k.transpose(-2, -1) / math.sqrt(gpt.WIDTH))
        scores = scores.masked_fill(self.tril[:tokens, :tokens] == 0, float("-inf"))
        y = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)
        mixed: Tensor = self.out(y.reshape(batch, tokens, gpt.HIDDEN))
        return mixed


def spoiled() -> nn.Module:
    """Return a GPT of which the second attention is spoiled."""
    module = gpt.Gpt()
    block: Any = module.blocks[1]
    block.attention = Spoiled()
    return gpt.perturbed(module, seed=1)


def test_a_spoiled_layer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FusionError, match=r"1 of 2 fused; blocks\.1\.attention.*Relu"):
        llmopt.compile(spoiled(), output=tmp_path / "out", require=["attention=all"])

    artifact = llmopt.compile(spoiled(), output=tmp_path / "out")

    assert artifact.fusion["attention"].fused == 1
    assert artifact.manifest.verification["status"] == "passed"


@pytest.mark.parametrize("scheme", ["w8", "w8a8-dynamic"])
def test_an_encoder_is_proven_in_every_scheme(scheme: str, tmp_path: Path) -> None:
    import bert

    artifact = llmopt.compile(bert.make(), output=tmp_path / "out", quantize=scheme)

    assert artifact.manifest.verification["worst_error_rel"] <= 1e-3
    assert artifact.manifest.quality["cosine_mean"] > 0.9
    assert selftest(artifact.path).passed


def test_a_decoder_answers_through_its_cache(traced: Traced, tmp_path: Path) -> None:
    runner = llmopt.load(traced.compiled("onnxruntime-cpu", tmp_path / "out", batch=1))
    assert selftest(tmp_path / "out").checks[2].compared == 16 * 92  # one row, as --batch says
    ids = np.array([[5, 9, 11, 3, 8, 7]])

    assert np.allclose(runner.logits(ids, prefill=2), runner.logits(ids, prefill=6), atol=1e-4)
    with pytest.raises(llmopt.LlmoptError):
        runner.generate("word", chat=True)


@pytest.mark.parametrize(
    "target", ["onnxruntime-cpu", pytest.param("tvm-cpu", marks=pytest.mark.slow)]
)
def test_a_table_tied_to_a_head_of_int8_is_rounded_with_it(
    target: str, traced: Traced, tmp_path: Path
) -> None:
    artifact = traced.compiled(target, tmp_path / "out", quantize="w8a8-dynamic")

    assert artifact.manifest.verification["worst_error_rel"] <= 1e-3
    assert llmopt.load(artifact).logits(np.array([[5, 9, 11]])).shape[:2] == (1, 3)
