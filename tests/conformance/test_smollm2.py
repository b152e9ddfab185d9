"""SmolLM2-135M-Instruct, compiled: what transformers computes, through every door."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import shapes
import torch
from support import real_models

import llmopt

pytestmark = pytest.mark.slow

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "Water boils at",
    "The three laws of robotics say that a robot",
)
NEW = 64
CLOSE = 1e-4  # where transformers' own top two are nearer than this, either is right


@pytest.fixture(scope="module")
def oracle() -> Any:
    """Transformers' own reading of the GGUF file."""
    torch.set_num_threads(2)
    return real_models.transformers_from_gguf(real_models.smollm2_gguf())


def compiled(source: Path, output: Path) -> Any:
    return llmopt.compile(source, output=output, require=["attention=all", "norm=all"])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The unquantized artifact."""
    return compiled(real_models.smollm2_gguf(), tmp_path_factory.mktemp("smollm2") / "fp32")


@pytest.fixture(scope="module")
def from_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same from the other form of the checkpoint."""
    work = tmp_path_factory.mktemp("folder")
    shapes.smollm2(work / "hf")
    return compiled(work / "hf", work / "fp32")


def tokens(artifact: Any, text: str) -> list[int]:
    return llmopt.load(artifact).tokenizer.encode(text)


def greedy(oracle: Any, ids: list[int]) -> tuple[list[int], np.ndarray]:
    """Return transformers' greedy continuation and the margin of each choice."""
    with torch.inference_mode():
        out = oracle.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NEW,
            eos_token_id=-1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
        )
    logits = torch.stack(out.logits)[:, 0]
    best = logits.topk(2).values
    return out.sequences[0, len(ids) :].tolist(), (best[:, 0] - best[:, 1]).numpy()


def assert_same(found: list[int], wanted: list[int], margins: np.ndarray) -> None:
    """Equal up to the first place where transformers' own choice hangs on less than CLOSE."""
    for index, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        if mine != theirs:
            assert margins[index] < CLOSE, f"token {index}: {mine}, not {theirs}"
            return


def bare_greedy(folder: Path, batch: list[list[int]]) -> list[list[int]]:
    """Decode a left-padded batch with a plain session, from the input names alone."""
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    width = max(map(len, batch))
    ids = np.array([[0] * (width - len(row)) + row for row in batch])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in batch])
    position = np.maximum(np.cumsum(mask, 1) - 1, 0)
    caches = {
        port.name: np.zeros((len(batch), port.shape[1], 0, port.shape[3]), np.float32)
        for port in session.get_inputs()
        if port.name.startswith("past_key_values")
    }
    names = [output.name for output in session.get_outputs()]
    new = []
    for _ in range(NEW):
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": position, **caches}
        found = dict(zip(names, session.run(names, feeds), strict=True))
        caches = {name: found[name.replace("past_key_values", "present")] for name in caches}
        ids = np.argmax(found["logits"][:, -1:], axis=-1)
        new.append(ids[:, 0])
        position = position[:, -1:] + 1
        mask = np.concatenate([mask, np.ones((len(batch), 1), mask.dtype)], axis=1)
    return [list(map(int, row)) for row in np.stack(new, 1)]


def test_greedy_tokens_equal_transformers(artifact: Any, oracle: Any) -> None:
    runner = llmopt.load(artifact)
    batch = [tokens(artifact, text) for text in PROMPTS]
    wanted = [greedy(oracle, ids) for ids in batch]

    for ids, (theirs, margins) in zip(batch, wanted, strict=True):
        (mine,) = runner.generate_ids([ids], max_new_tokens=NEW, stop_tokens=())
        assert_same(list(mine), theirs, margins)
        assert_same(bare_greedy(artifact.path, [ids])[0], theirs, margins)

    together = runner.generate_ids(batch[:3], max_new_tokens=NEW, stop_tokens=())
    bare = bare_greedy(artifact.path, batch[:3])
    for mine, plain, (theirs, margins) in zip(together, bare, wanted[:3], strict=True):
        assert_same(list(mine), theirs, margins)
        assert_same(plain, theirs, margins)


@pytest.mark.parametrize("form", ["artifact", "from_folder"])
def test_logits_at_prefill_and_every_step(
    form: str, oracle: Any, request: pytest.FixtureRequest
) -> None:
    artifact = request.getfixturevalue(form)
    ids = (tokens(artifact, "The quick brown fox jumps over the lazy dog") * 4)[:33]
    with torch.inference_mode():
        wanted = oracle(torch.tensor([ids])).logits.numpy()

    found = llmopt.load(artifact).logits(np.array([ids]), prefill=len(ids) - 16)

    for position in range(len(ids)):
        scale = np.abs(wanted[0, position]).max()
        assert np.abs(found[0, position] - wanted[0, position]).max() <= 1e-3 * scale, position


def test_everything_is_fused(artifact: Any) -> None:
    report = artifact.summary()["fusion"]
    assert (report["attention"]["expected"], report["attention"]["fused"]) == (30, 30)
    assert (report["rotary"]["expected"], report["rotary"]["fused"]) == (30, 30)
    assert (report["norm"]["expected"], report["norm"]["fused"]) == (61, 61)
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    assert manifest["model"]["cache"] == "shared"


def test_genai_yields_the_same_tokens(artifact: Any) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")
    model = genai.Model(str(artifact.path))
    runner = llmopt.load(artifact)
    for text in PROMPTS[:3]:
        ids = tokens(artifact, text)
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + 32, do_sample=False)
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array(ids, np.int32))
        theirs = []
        while not generator.is_done():
            generator.generate_next_token()
            theirs.append(int(generator.get_next_tokens()[0]))
        (mine,) = runner.generate_ids([ids], max_new_tokens=32)
        assert list(mine) == theirs


@pytest.mark.thorough
def test_w8_keeps_the_quality_it_promises(tmp_path: Path) -> None:
    quantized = llmopt.compile(real_models.smollm2_gguf(), quantize="w8", output=tmp_path / "w8")

    quality = quantized.summary()["quality"]

    assert quality["kl_mean"] <= 0.01
    assert quality["top1"] >= 0.94
    answer = llmopt.load(quantized).generate("Why is the sky blue?", chat=True, max_new_tokens=24)
    assert "sky" in answer
