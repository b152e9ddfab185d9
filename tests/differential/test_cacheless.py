"""Decoders that know of no cache are given one, and go on as they did without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from cacheless import DECODERS, VOCABULARY, OneKeyHead, RotaryBuffer, SlidingWindow, make
from support.onnx_decoder import decoder
from torch import Tensor, nn

import llmopt
from llmopt.frontend import source as sources
from llmopt.frontend.base import Source, SourceOptions
from llmopt.passes.pipeline import Item, Pipeline
from llmopt.passes.remove_dead import RemoveDead
from llmopt.verification import relative_error

PROMPTS = [[3, 5, 7, 10], [1, 2, 3, 4, 5, 6, 7]]
NEW = 64


def greedy(module: nn.Module, prompt: Sequence[int], count: int) -> list[int]:
    """Return the tokens that torch goes on with, all of them anew at every step."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids = torch.tensor([tokens])
            masked = isinstance(module, SlidingWindow)
            logits: Tensor = module(ids, torch.ones_like(ids)) if masked else module(ids)
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def check(kind: type[nn.Module], folder: Path) -> llmopt.Artifact:
    module = make(kind)
    artifact = llmopt.compile(module, output=folder / "out")
    assert artifact.notes[-1] == "add-kv-cache: keys and values of 2 layers are remembered"
    assert artifact.manifest.signature.has_cache
    assert artifact.manifest.verification["worst_error_rel"] <= 1e-4
    wanted = [greedy(module, prompt, NEW) for prompt in PROMPTS]
    runner = llmopt.load(artifact)
    assert runner.generate_ids(PROMPTS, max_new_tokens=NEW) == wanted
    # tokens of random weights soon go round in circles: logits of others too, one by one
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, (2, NEW))
    ids = torch.from_numpy(tokens)
    given = (ids, torch.ones_like(ids)) if kind is SlidingWindow else (ids,)
    with torch.inference_mode():
        logits = module(*given).numpy()
    assert relative_error(runner.logits(tokens, prefill=5), logits) <= 1e-4
    return artifact


def test_a_cache_is_added_and_64_tokens_stay_the_same(tmp_path: Path) -> None:
    artifact = check(RotaryBuffer, tmp_path)
    assert artifact.manifest.model.cache == "shared"
    assert artifact.fusion["attention"].fused == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind is not RotaryBuffer])
def test_each_decoder_goes_on_as_it_did_without(kind: type[nn.Module], tmp_path: Path) -> None:
    artifact = check(kind, tmp_path)
    assert artifact.fusion["attention"].fused == (0 if kind is SlidingWindow else 2)
    if kind is OneKeyHead:
        assert artifact.manifest.model.kv_heads == 1


def written(path: Path, changed: Mapping[str, str] | None = None) -> Path:
    """Write a decoder of one layer as ONNX, some of its lines changed."""
    ir.save(decoder(changed).model, path)
    return path


def test_a_file_is_given_a_cache_too_and_padded_rows_are_what_they_are_alone(
    tmp_path: Path,
) -> None:
    source = written(tmp_path / "decoder.onnx")
    artifact = llmopt.compile(source, output=tmp_path / "out", max_length=16)
    plain = llmopt.compile(
        source, output=tmp_path / "plain", passes="default,-add-kv-cache", max_length=16
    )
    assert artifact.manifest.signature.has_cache
    assert artifact.manifest.verification["cases"] == 8
    assert not plain.manifest.signature.has_cache
    assert not any("add-kv-cache" in note for note in plain.notes)
    together = llmopt.load(artifact).generate_ids(PROMPTS, max_new_tokens=8)
    assert together == llmopt.load(plain).generate_ids(PROMPTS, max_new_tokens=8)


def test_a_refusal_names_the_node_and_the_model_stays_as_it_is(tmp_path: Path) -> None:
    source = written(tmp_path / "sums.onnx", {"extra": "y = CumSum (x, one)"})
    artifact = llmopt.compile(source, output=tmp_path / "out", max_length=16)

    (note,) = [note for note in artifact.notes if note.startswith("add-kv-cache")]
    assert "'y': CumSum sums over all earlier tokens" in note
    assert artifact.manifest.model.cache == "none"
    assert artifact.manifest.verification["status"] == "passed"


def test_a_backend_with_caches_of_its_own_leaves_out_what_it_cannot_keep(tmp_path: Path) -> None:
    artifact = compiled_without_a_cache(tmp_path, passes="default")

    assert "no KV cache on tvm-cpu" in artifact.notes[-1]
    assert "'present.0.key' is not an output of Attention" in artifact.notes[-1]
    assert artifact.manifest.pipeline.count("add-kv-cache") == 0
    assert artifact.manifest.verification["status"] == "passed"


@pytest.mark.parametrize(
    "passes",
    [
        "default,-lower-linear",  # a lowering pass among the others
        ["default", RemoveDead()],
        Pipeline.parse("default"),
    ],
    ids=["text", "sequence", "pipeline"],
)
def test_a_cache_is_left_out_of_any_form_of_pipeline(
    passes: str | Pipeline | Sequence[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def open_counted(path: Path, options: SourceOptions) -> Source:
        opened.append(path)
        return open_source(path, options)

    open_source = sources.open_source
    monkeypatch.setattr(sources, "open_source", open_counted)
    compiled_without_a_cache(tmp_path, passes=passes, verify="off")

    assert len(opened) == 1  # the Program that was traced is optimized again, not its source


def compiled_without_a_cache(folder: Path, **options: Any) -> llmopt.Artifact:
    bent = {"scores": "half1 = Mul (product, half)\nscores = Relu (half1)"}
    path = written(folder / "bent.onnx", bent)
    artifact = llmopt.compile(
        path, target="tvm-cpu", output=folder / "out", max_length=16, **options
    )
    assert "no KV cache on tvm-cpu" in artifact.notes[-1]
    assert artifact.manifest.pipeline.count("add-kv-cache") == 0
    assert not artifact.manifest.signature.has_cache
    return artifact
