"""Padding in front: an encoder's hidden states are those of transformers on every real token.

A mask that is taken for one of lengths is right with padding behind, and wrong by 5e-2 with padding
in front.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
import transformers
from matrix_families import FAMILIES

import llmopt
from llmopt.verification import relative_error

TOLERANCE: Final = 1e-5  # float32, two layers
ENCODERS: Final = [name for name, family in FAMILIES.items() if family.kind == "encoder"]
PADDING: Final = (0, 3, 10)
LENGTH: Final = 17


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_padding_on_either_side_changes_no_real_token(name: str, tmp_path: Path) -> None:
    FAMILIES[name].write(tmp_path / "source")
    model = transformers.AutoModel.from_pretrained(tmp_path / "source", dtype=torch.float32).eval()
    artifact = llmopt.compile(tmp_path / "source", output=tmp_path / "artifact", verify="off")
    runner = llmopt.load(artifact)
    ids = np.random.default_rng(0).integers(3, 101, (len(PADDING), LENGTH))
    for side in ("front", "behind"):
        mask = np.ones_like(ids)
        for row, count in enumerate(PADDING):
            padded = slice(count) if side == "front" else slice(LENGTH - count, LENGTH)
            mask[row, padded] = 0
        tokens = np.where(mask == 1, ids, model.config.pad_token_id or 0)
        feeds = {"input_ids": tokens, "attention_mask": mask}
        with torch.inference_mode():
            given = {key: torch.from_numpy(array) for key, array in feeds.items()}
            wanted = model(**given).last_hidden_state.numpy()
        if "token_type_ids" in runner.session.inputs:
            feeds["token_type_ids"] = np.zeros_like(tokens)
        found = runner.run(feeds)["last_hidden_state"]
        assert relative_error(found[mask == 1], wanted[mask == 1]) < TOLERANCE, side
