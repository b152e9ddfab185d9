"""Sentences to vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny_artifacts import HIDDEN, TinyEncoder

from llmopt.errors import UsageError
from llmopt.interface.arrays import Array
from llmopt.runtime import Runner, load
from llmopt.runtime.embedding import batches

TEXTS = ["a", "three words here", "é", "twice", "sixteen letters.", "mid text"]
POOLED = {
    "mean": lambda hidden: hidden.mean(axis=0),
    "mean_sqrt_len": lambda hidden: hidden.sum(axis=0) / np.sqrt(len(hidden)),
    "max": lambda hidden: hidden.max(axis=0),
    "cls": lambda hidden: hidden[0],
    "last": lambda hidden: hidden[-1],
}


def expected(encoder: TinyEncoder, pooling: str) -> Array:
    hidden = (encoder.hidden(list(text.encode())[: encoder.max_length]) for text in TEXTS)
    return np.stack([POOLED[pooling](rows) for rows in hidden])


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_embeddings_come_in_the_order_of_the_texts(folders: Path, batch_size: int) -> None:
    got = load(folders / "encoder", threads=1).embed(TEXTS, batch_size)
    assert got.dtype == np.float32
    assert np.abs(got - expected(TinyEncoder(), "mean")).max() < 1e-5


@pytest.mark.parametrize("pooling", POOLED)
def test_hidden_states_are_pooled_as_the_manifest_says(tmp_path: Path, pooling: str) -> None:
    encoder = TinyEncoder(pooling, embedding=False)
    got = load(encoder.write(tmp_path / "a"), threads=1).embed(TEXTS, 3)
    assert np.abs(got - expected(encoder, pooling)).max() < 1e-5


def test_long_texts_are_cut_and_it_is_said(
    tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    encoder = TinyEncoder(max_length=5)
    got = load(encoder.write(tmp_path / "a"), threads=1).embed(TEXTS)
    assert np.abs(got - expected(encoder, "mean")).max() < 1e-5
    assert messages.messages == ["3 of 6 texts were cut to 5 tokens"]


def test_no_texts_give_no_rows(folders: Path) -> None:
    assert load(folders / "encoder", threads=1).embed([]).shape == (0, HIDDEN)


def test_batches_hold_like_lengths_and_every_place_once() -> None:
    lengths = [5, 1, 9, 9, 2, 5, 7]
    found = list(batches(lengths, 3))
    assert sorted(place for batch in found for place in batch) == list(range(7))
    assert [[lengths[i] for i in batch] for batch in found] == [[9, 9, 7], [5, 5, 2], [1]]


def test_what_cannot_be_embedded_is_refused(folders: Path, decoder: Runner, tmp_path: Path) -> None:
    encoder = load(folders / "encoder", threads=1)
    with pytest.raises(UsageError, match="list of texts"):
        encoder.embed("one text")
    with pytest.raises(UsageError, match="batch_size 0"):
        encoder.embed(["a"], 0)
    with pytest.raises(UsageError, match="computes no embeddings, it is for 'generate'"):
        decoder.embed(["a"])
    unpooled = TinyEncoder(None, embedding=False).write(tmp_path / "a")
    with pytest.raises(UsageError, match="computes no embeddings, it is for"):
        load(unpooled, threads=1).embed(["a"])
