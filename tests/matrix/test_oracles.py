"""What rows of the matrix are compared with is transformers' own, and counted in its own module."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest
import torch
import transformers
from matrix_families import FAMILIES
from matrix_oracles import rewriting

from llmopt.frontend.census import census
from llmopt.verification import relative_error

WRITTEN: Final = np.array([[5, 9, 30, 77, 12], [7, 8, 41, 60, 3], [23, 4, 90, 61, 16]])
READ: Final = np.array([[11, 12, 13, 14], [31, 32, 33, 0], [0, 0, 53, 54]])
LAYERS: Final = {"encoder": 2, "decoder": 3}
EXACT: Final = 1e-5  # float32, rows one by one or together


pytestmark = pytest.mark.xdist_group("oracles")  # of one model


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bart")
    FAMILIES["bart"].write(folder)
    return transformers.BartForConditionalGeneration.from_pretrained(folder).eval()


def batch(real: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Return what is read, padded on either side, and what is written where ``real`` is 1."""
    return {
        "encoder.input_ids": READ,
        "encoder.attention_mask": np.where(READ == 0, 0, 1),
        "input_ids": np.where(real == 1, WRITTEN, 0),
        "attention_mask": real,
    }


def test_attentions_to_what_was_read_are_counted(bart: Any) -> None:
    whole = rewriting(bart, ["input_ids", "attention_mask"])
    row = {name: array[:1] for name, array in batch(np.ones_like(WRITTEN)).items()}

    counted = census(bart, lambda: list(whole.run([row])))

    reads, writes = LAYERS["encoder"], LAYERS["decoder"]
    assert counted == {"attention": reads + 2 * writes, "norm": 2 * reads + 3 * writes + 2}


def test_padding_behind_gives_what_transformers_gives_for_the_batch(bart: Any) -> None:
    real = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    given = batch(real)
    (found,) = rewriting(bart, ["input_ids", "attention_mask"]).run([given])

    with torch.inference_mode():
        tensors = {name: torch.from_numpy(array) for name, array in given.items()}
        wanted = bart(
            input_ids=tensors["encoder.input_ids"],
            attention_mask=tensors["encoder.attention_mask"],
            decoder_input_ids=tensors["input_ids"],
            decoder_attention_mask=tensors["attention_mask"],
        )

    assert relative_error(found["logits"][real == 1], wanted.logits.numpy()[real == 1]) < EXACT
    read = READ != 0
    memory = wanted.encoder_last_hidden_state.numpy()
    assert relative_error(found["last_hidden_state"][read], memory[read]) < EXACT


def test_padding_in_front_changes_no_token_that_is_written(bart: Any) -> None:
    whole = rewriting(bart, ["input_ids", "attention_mask"])
    (plain,) = whole.run([batch(np.ones_like(WRITTEN))])
    front = {name: np.copy(array) for name, array in batch(np.ones_like(WRITTEN)).items()}
    for name in ("input_ids", "attention_mask"):
        front[name] = np.concatenate([np.zeros((3, 2), np.int64), front[name]], axis=1)
    (padded,) = whole.run([front])

    assert padded["logits"].shape == (3, 7, 101)
    assert relative_error(padded["logits"][:, 2:], plain["logits"]) < EXACT
    assert not padded["logits"][:, :2].any()
