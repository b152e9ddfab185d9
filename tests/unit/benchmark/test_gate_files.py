"""Baselines and budgets: the files that the gate reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.gate_samples import measured

from llmopt.artifact.manifest import Manifest
from llmopt.benchmark.gate.amounts import amount
from llmopt.benchmark.gate.baselines import (
    Baseline,
    BaselineArtifact,
    comparable,
    differences,
    read_baseline,
)
from llmopt.benchmark.gate.budgets import budgets_for, read_budgets
from llmopt.benchmark.machine import this_machine
from llmopt.errors import (
    LlmoptError,
    SourceError,
    SourceNotFoundError,
    UnknownNameError,
    UsageError,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A baseline's file."""
    manifest = Manifest(
        target="onnxruntime-cpu", entry="model.onnx", task="generate", work={"other_bytes": 1}
    )
    stored = BaselineArtifact(
        "prefill=4,decode=4", 1, manifest, tuple(measured(2, sides=["baseline"]))
    )
    path = tmp_path / "baseline.json"
    path.write_text(Baseline(comparable(this_machine()), {"model": stored}).to_json())
    return path


def edited(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_a_baseline_comes_back_as_it_was_written(file: Path) -> None:
    found = read_baseline(file)
    assert found.to_json() == file.read_text()
    assert found.artifacts["model"].measured == tuple(measured(2, sides=["baseline"]))
    assert not differences(found.machine, comparable(this_machine()))


def test_another_version_of_llmopt_is_the_same_machine() -> None:
    facts = comparable(this_machine())
    assert "llmopt" not in facts["versions"]
    assert "onnxruntime" in facts["versions"]


def test_another_machine_is_told_apart_and_said_how() -> None:
    here = comparable(this_machine())
    there = here | {"cores": here["cores"] + 1, "versions": here["versions"] | {"numpy": "1.0"}}
    told = differences(there, here)
    assert f"cores {here['cores'] + 1} there, {here['cores']} here" in told
    assert "numpy 1.0 there" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema 2; this llmopt reads 1"),
        ({"kind": "other"}, "not a baseline"),
        ({"artifacts": {}}, "the baseline has no artifacts"),
        ({"artifacts": {"model": {}}}, "damaged"),
        ({"artifacts": {"model": 3}}, "damaged"),
        ({"artifacts": [1]}, "damaged"),
    ],
)
def test_what_is_no_baseline_is_refused(file: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        read_baseline(edited(file, **changes))
    assert "--update" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff", '{"kind": "llmopt-baseline"'])
def test_an_empty_or_broken_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "baseline.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SourceError, match=r"baseline\.json: (not a baseline|damaged)"):
        read_baseline(path)


@pytest.mark.parametrize("sample", ["NaN", "-1.0", "0", "Infinity", '"x"', "null"])
def test_samples_that_are_no_times_are_refused(file: Path, sample: str) -> None:
    text = file.read_text()
    first = text[text.index('"ttft_s"') :].split("[", 3)[3].split("]")[0].strip()
    file.write_text(text.replace(first, sample, 1))
    with pytest.raises(SourceError, match=r"positive number|damaged"):
        read_baseline(file)


def test_budgets_are_read_with_their_units(tmp_path: Path) -> None:
    path = tmp_path / "llmopt.toml"
    path.write_text(
        '[[budget]]\nartifact = "smol*"\nmetric = "ttft_s"\nmax = "15ms"\nmax_regression = "3%"\n'
        '[[budget]]\nartifact = "mini"\nmetric = "size_bytes"\nmax = "90 MB"\n'
        '[[budget]]\nartifact = "mini"\nmetric = "top1"\nmin = 0.9\n'
    )
    first, second, third = read_budgets(path)
    assert first.most == pytest.approx(0.015)
    assert first.max_regression == pytest.approx(0.03)
    assert second.most == 90e6
    assert third.least == 0.9
    assert budgets_for((first, second, third), "smollm2") == (first,)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("budget = 3", UsageError, "write"),
        ("[[budget", SourceError, "cannot be read"),
        ('[[budget]]\nmetric = "ttft_s"\nmax = 1', UsageError, "artifact must be a string"),
        ('[[budget]]\nartifact = "a"\nmetric = "speed"\nmax = 1', UnknownNameError, "ttft_s"),
        ('[[budget]]\nartifact = "a"\nmetric = "ttft_s"\nmx = 1', UnknownNameError, "did you mean"),
        ('[[budget]]\nartifact = "a"\nmetric = "ttft_s"', UsageError, "no limit"),
        (
            '[[budget]]\nartifact = "a"\nmetric = "ttft_s"\nmax = "fast"',
            UsageError,
            "not an amount",
        ),
        ('[[budget]]\nartifact = "a"\nmetric = "ttft_s"\nmin = 1', UsageError, "takes only max"),
        (
            '[[budget]]\nartifact = "a"\nmetric = "ttft_s"\nmax = 0',
            UsageError,
            "max must be above 0",
        ),
    ],
)
def test_budgets_that_make_no_sense_are_refused(
    tmp_path: Path, text: str, error: type[LlmoptError], message: str
) -> None:
    path = tmp_path / "llmopt.toml"
    path.write_text(text)
    with pytest.raises(error, match=message):
        read_budgets(path)


def test_a_config_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="not found"):
        read_budgets(tmp_path / "llmopt.toml")


@pytest.mark.parametrize("text", ["", "%", "-5%", "5 parsecs", "nan", None, True, -1, [5]])
def test_what_is_no_amount_is_refused(text: object) -> None:
    with pytest.raises(UsageError, match="--max-regression"):
        amount(text, "--max-regression")
