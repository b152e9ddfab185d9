"""llmopt evaluate, and the evaluation behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_artifacts import TinyDecoder, TinyEncoder

from llmopt.errors import UsageError
from llmopt.evaluation import Similarity, evaluate, runner_results
from llmopt.quantization.evaluation import Quality
from llmopt.runtime import load


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny decoder and encoder with weights a little off."""
    root = tmp_path_factory.mktemp("moved")
    decoder = TinyDecoder("shared")
    rng = np.random.default_rng(1)
    for name, value in decoder.weights.items():
        decoder.weights[name] = value + rng.normal(0, 0.05, value.shape).astype(np.float32)
    decoder.write(root / "decoder")
    encoder = TinyEncoder()
    TinyEncoder(table=encoder.table + rng.normal(0, 0.2, encoder.table.shape)).write(
        root / "encoder"
    )
    return root


def test_an_artifact_is_like_itself(llmopt: Any, made: Path) -> None:
    result = llmopt("evaluate", made / "shared", "--reference", made / "concat", "--json")

    data = json.loads(result.stdout)
    assert data["kl_mean"]["value"] < 1e-9
    assert data["top1"]["value"] == 1
    assert data["perplexity"]["value"] == pytest.approx(data["perplexity_reference"]["value"])
    assert data["text"] == "8 x 47 tokens written by the artifact itself"
    assert data["samples"] == 8 * 47


def test_the_table_has_values_and_errors(llmopt: Any, made: Path, moved: Path) -> None:
    result = llmopt("evaluate", moved / "decoder", "--reference", made / "shared")

    assert result.exit_code == 0, result.stderr
    assert f"{moved / 'decoder'} against {made / 'shared'}, on 8 x 47 tokens" in result.stdout
    rows = {line[:29].strip(): line[29:].split() for line in result.stdout.splitlines()[3:]}
    assert float(rows["mean KL divergence, nats"][0]) > 1e-3
    assert all(len(numbers) == 2 for numbers in rows.values())
    assert "perplexity of the reference" in rows


def test_text_is_cut_into_windows(llmopt: Any, made: Path, moved: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x" * 100, encoding="utf-8")

    line = ["evaluate", moved / "decoder", "--reference", made / "shared", "--json"]
    data = json.loads(llmopt(*line, "--text", tmp_path / "text").stdout)

    assert data["text"] == "100 of the 100 tokens of the text, 48 at a time"
    assert data["samples"] == 47 + 47 + 3
    assert data["kl_p99"] is None


def test_quality_is_what_the_meter_says_of_the_same_logits(made: Path, moved: Path) -> None:
    found = evaluate(
        load(moved / "decoder"), runner_results(load(made / "shared")), "some text"
    ).found

    tokens = np.array([list(b"some text")])
    p = load(made / "shared").logits(tokens)[0, :-1].astype(np.float64)
    q = load(moved / "decoder").logits(tokens)[0, :-1].astype(np.float64)
    p -= np.log(np.exp(p).sum(-1, keepdims=True))
    q -= np.log(np.exp(q).sum(-1, keepdims=True))
    assert isinstance(found, Quality)
    assert found.samples == 8
    assert found.kl_mean.value == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    following = -q[np.arange(8), tokens[0, 1:]].mean()
    assert found.perplexity is not None
    assert found.perplexity.value == pytest.approx(np.exp(following), rel=1e-4)


def test_an_encoder_is_compared_by_cosine(llmopt: Any, made: Path, moved: Path) -> None:
    result = llmopt("evaluate", moved / "encoder", "--reference", made / "encoder")

    assert result.exit_code == 0, result.stderr
    assert "8 rows of random tokens" in result.stdout
    assert "mean cosine" in result.stdout
    assert "lowest cosine" in result.stdout


def test_an_encoder_reads_one_text_a_line(made: Path, moved: Path) -> None:
    reference = runner_results(load(made / "encoder"))
    result = evaluate(load(moved / "encoder"), reference, "one\n\ntwo\nthree\n")

    assert result.text == "3 lines of the text"
    assert isinstance(result.found, Similarity)
    texts = ["one", "two", "three"]
    a, b = load(moved / "encoder").embed(texts), load(made / "encoder").embed(texts)
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert result.found.samples == 3
    assert result.found.cosine_mean.value == pytest.approx(cosines.mean(), abs=1e-6)
    assert result.found.cosine_min == pytest.approx(cosines.min(), abs=1e-6)


def test_a_source_can_be_the_reference(llmopt: Any, bigram: Path, tmp_path: Path) -> None:
    line = ["--target", "cpu", "--verify", "off", "-o", tmp_path / "out"]
    assert llmopt("compile", bigram, *line).exit_code == 0

    result = llmopt("evaluate", tmp_path / "out", "--reference", bigram, "--json")

    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["kl_mean"]["value"] < 1e-6


@pytest.mark.parametrize(
    ("text", "says"), [("", "too few"), ("a", "1 tokens: too few")], ids=["empty", "one token"]
)
def test_too_little_text_is_refused(text: str, says: str, made: Path) -> None:
    runner = load(made / "shared")

    with pytest.raises(UsageError, match=says):
        evaluate(runner, runner_results(runner), text)


def test_an_empty_text_has_no_lines(made: Path) -> None:
    runner = load(made / "encoder")

    with pytest.raises(UsageError, match="one text a line"):
        evaluate(runner, runner_results(runner), "\n")


def test_different_models_are_not_compared(llmopt: Any, made: Path) -> None:
    for pair in (("shared", "encoder"), ("encoder", "shared")):
        result = llmopt("evaluate", made / pair[0], "--reference", made / pair[1])
        assert result.exit_code == 2
        assert "logits" in result.stderr.splitlines()[-1]


def test_the_text_has_to_be_text(llmopt: Any, made: Path, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    line = ["evaluate", made / "shared", "--reference", made / "shared", "--text"]

    assert "not UTF-8" in llmopt(*line, tmp_path / "bytes").stderr
    assert "not found" in llmopt(*line, tmp_path / "nothing").stderr
