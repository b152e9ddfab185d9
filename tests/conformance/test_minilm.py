"""all-MiniLM-L6-v2, compiled: the embeddings of sentence-transformers' arithmetic in torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import real_models
from tokenizers import Tokenizer

import llmopt

pytestmark = pytest.mark.slow

TEXT = (
    "the river carries cold water past old stone mills while children throw small boats "
    "made of paper and count how long each one floats before a gust takes it under so that "
    "nobody agrees who has won and the evening comes with bread soup and a long argument"
)


def sentences() -> list[str]:
    """A hundred sentences of 1 to 60 words, in no order of length."""
    rng = np.random.default_rng(0)
    lengths = rng.permutation(np.linspace(1, 60, 100).astype(int))
    return [" ".join(rng.choice(TEXT.split(" "), count)) for count in lengths]


@pytest.fixture(scope="module")
def wanted() -> np.ndarray:
    """Mean pooling and normalization of transformers' BERT, each sentence alone."""
    from transformers import AutoModel

    folder = real_models.minilm_folder()
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    tokenizer.enable_truncation(limit)
    rows = []
    for text in sentences():
        encoded = tokenizer.encode(text)
        with torch.inference_mode():
            hidden = model(torch.tensor([encoded.ids])).last_hidden_state[0]
        mean = hidden.mean(0)
        rows.append((mean / mean.norm()).numpy())
    return np.stack(rows)


def compiled(folder: Path, **options: Any) -> Any:
    return llmopt.load(llmopt.compile(real_models.minilm_folder(), output=folder, **options))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray(np.sum(a * b, 1) / norms)


def test_embeddings_in_padded_batches(tmp_path: Path, wanted: np.ndarray) -> None:
    runner = compiled(tmp_path / "fp32", require=["attention=all", "norm=all"])

    found = runner.embed(sentences(), batch_size=16)

    assert found.shape == (100, 384)
    assert cosines(found, wanted).min() >= 0.99999


def test_int8_keeps_close_and_ignores_batch_mates(tmp_path: Path, wanted: np.ndarray) -> None:
    runner = compiled(tmp_path / "int8", quantize="w8a8-dynamic")

    together = runner.embed(sentences(), batch_size=16)
    alone = np.concatenate([runner.embed([text]) for text in sentences()])

    assert cosines(together, wanted).mean() >= 0.99
    assert cosines(together, alone).min() >= 0.995
