"""Beam search and the rules of a checkpoint write what transformers writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_encoder_decoders import EOS, START, VOCABULARY, tiny_model

from llmopt.errors import ArtifactError, UsageError
from llmopt.runtime.beam_search import Beams, Search, log_softmax
from llmopt.runtime.logits_processors import Rules, unheeded

NEW = 11
LIMIT = NEW + 1


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("bart")


@pytest.fixture(scope="module")
def source() -> torch.Tensor:
    return torch.tensor(np.random.default_rng(0).integers(4, VOCABULARY, (3, 7)))


def following(model: Any, source: torch.Tensor, rows: Sequence[Sequence[int]]) -> Any:
    """Return the logits [R, V] after each row, of sources that have equally many rows each."""
    with torch.no_grad():
        repeated = source.repeat_interleave(len(rows) // len(source), dim=0)
        found = model(input_ids=repeated, decoder_input_ids=torch.tensor(rows), use_cache=False)
    return found.logits[:, -1].numpy()


def searched(model: Any, source: torch.Tensor, search: Search, rules: Rules) -> list[list[int]]:
    each = [Beams(search, [START]) for _ in source]
    while not all(beams.over for beams in each):
        rows = [row for beams in each for row in beams.running]
        logs = log_softmax(following(model, source, rows))
        logs = rules.apply(logs, rows, search.begun, search.limit)
        for beams, part in zip(each, np.split(logs, len(each)), strict=True):
            beams.advance(part)
    return [beams.best for beams in each]


def cut(row: list[int]) -> list[int]:
    """Return a row of transformers up to its end, without what fills it up."""
    return row[: row.index(EOS, 1) + 1] if EOS in row[1:] else row


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "no_repeat_ngram_size": 1},
        {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram_size": 1},
        {"num_beams": 2, "length_penalty": -1.0, "early_stopping": "never"},
        {
            "num_beams": 5,
            "length_penalty": 0.7,
            "early_stopping": "never",
            "no_repeat_ngram_size": 2,
        },
        {"num_beams": 3, "length_penalty": 0.0, "no_repeat_ngram_size": 2, "min_length": 9},
        {"num_beams": 2, "bad_words_ids": [[17], [24, 53]], "forced_bos_token_id": 8},
        {"num_beams": 3, "suppress_tokens": [17, 24], "forced_eos_token_id": EOS},
        {"num_beams": 2, "begin_suppress_tokens": [17, EOS], "min_new_tokens": 4},
    ],
    ids=str,
)
def test_a_search_finds_what_transformers_finds(
    options: Mapping[str, Any], model: Any, source: torch.Tensor, tmp_path: Path
) -> None:
    settings = {"eos_token_id": EOS, "decoder_start_token_id": START, **options}
    rules = rules_of(tmp_path, settings)
    search = Search(
        beams=rules.beams,
        length_penalty=rules.length_penalty,
        early_stopping=rules.early_stopping,
        eos=frozenset(rules.eos),
        begun=1,
        limit=LIMIT,
    )
    wanted = model.generate(input_ids=source, max_length=LIMIT, do_sample=False, **options)

    found = searched(model, source, search, rules)

    assert found == [cut(row) for row in wanted.tolist()]


def rules_of(folder: Path, settings: Mapping[str, Any]) -> Rules:
    import json

    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return Rules.read(folder)


def test_a_folder_without_settings_has_no_rules(tmp_path: Path) -> None:
    assert Rules.read(tmp_path) == Rules()
    scores = np.zeros((1, 4), np.float32)
    assert np.isfinite(Rules().apply(scores, [[0]], 1, 9)).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"early_stopping": "soon"}, "early_stopping should be true, false or 'never'"),
        ({"length_penalty": "2"}, "length_penalty should be a number"),
        ({"bad_words_ids": [3]}, "bad_words_ids should be lists of tokens"),
        ({"num_beams": 1.5}, "num_beams should be an integer"),
    ],
)
def test_a_setting_of_another_type_is_named(
    settings: Mapping[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=says):
        rules_of(tmp_path, settings)


def test_settings_that_are_no_json_are_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{", encoding="utf-8")

    with pytest.raises(ArtifactError, match="cannot be read"):
        Rules.read(tmp_path)


def test_settings_that_are_not_heeded_are_listed() -> None:
    assert unheeded({"repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 3}) == [
        "encoder_no_repeat_ngram_size"
    ]


@pytest.mark.parametrize("options", [{"beams": 0}, {"beams": 2, "early_stopping": "soon"}])
def test_a_search_out_of_range_is_refused(options: Mapping[str, Any]) -> None:
    with pytest.raises(UsageError):
        Search(**options)


def test_a_beam_that_cannot_go_on_gives_way() -> None:
    """Where everything is forbidden but the end, the end is what comes."""
    beams = Beams(Search(beams=2, eos=frozenset({1}), limit=9), [3])
    only = np.full((2, 5), -np.inf, np.float32)
    only[:, 1] = 0.0

    beams.advance(only)

    assert beams.best == [3, 1]
