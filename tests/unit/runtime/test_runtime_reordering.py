"""Rows of a decoder go on from what other rows remember, as beams do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny_artifacts import TinyDecoder

from llmopt.errors import UsageError
from llmopt.interface.facts import CacheKind
from llmopt.interface.stepping import Sequences
from llmopt.runtime import load

PROMPTS = np.array([[65, 66, 67], [70, 71, 72], [80, 81, 82]])
NEXT = np.array([[90], [91], [92]])


@pytest.mark.parametrize("cache", ["shared", "concat"])
def test_a_row_goes_on_from_what_another_remembers(cache: CacheKind, tmp_path: Path) -> None:
    tiny = TinyDecoder(cache)
    sequences = Sequences(load(tiny.write(tmp_path / "artifact"), threads=1).session, 3, 16)
    sequences.extend(PROMPTS)

    sequences.reorder([2, 0, 2])
    found = sequences.extend(NEXT)

    wanted = tiny.logits(np.concatenate([PROMPTS[[2, 0, 2]], NEXT], axis=1))[:, -1:]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_model_that_continues_text_is_not_searched(tmp_path: Path) -> None:
    runner = load(TinyDecoder().write(tmp_path / "artifact"), threads=1)

    with pytest.raises(UsageError, match="beams: it is for models that read one text"):
        runner.generate("a", beams=2)


def test_without_a_cache_rows_cannot_change_places(tmp_path: Path) -> None:
    session = load(TinyDecoder("none").write(tmp_path / "artifact"), threads=1).session
    sequences = Sequences(session, 3, 16)
    sequences.extend(PROMPTS)

    sequences.reorder([0, 1, 2])
    with pytest.raises(UsageError, match="does not support beam search"):
        sequences.reorder([1, 0, 2])
