"""SmolLM2-135M, real weights, compiled by TVM."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_models import smollm2_gguf

import llmopt

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"


def test_the_same_64_greedy_tokens_as_onnxruntime(tmp_path: Path) -> None:
    source = smollm2_gguf()
    texts = []
    for target in ("onnxruntime-cpu", "tvm-cpu"):
        artifact = llmopt.compile(source, target=target, output=tmp_path / target, verify="off")
        runner = llmopt.load(artifact)
        ids = runner.tokenizer.encode(PROMPT)
        texts.append(runner.generate_ids(ids, max_new_tokens=64, stop_tokens=()))

    assert len(texts[0]) == 64
    assert texts[0] == texts[1]
