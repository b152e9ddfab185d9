"""llmopt targets, passes and doctor, and how tables look."""

from __future__ import annotations

import doctest
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from llmopt.backends import ALIASES, BACKENDS
from llmopt.backends.base import Availability
from llmopt.backends.onnxruntime import OnnxRuntimeCpu
from llmopt.cli import doctor, inspect, summary, text
from llmopt.passes import DEFAULT, PASSES


def test_every_target_is_listed_with_its_aliases(llmopt: Any) -> None:
    shown = llmopt("targets").stdout
    data = json.loads(llmopt("targets", "--json").stdout)

    assert set(BACKENDS) <= {target["name"] for target in data["targets"]}
    for alias, name in ALIASES.items():
        [row] = [line for line in shown.splitlines() if line.startswith(name)]
        assert row.split()[1] == alias
        assert row.split()[2] == "yes"
        assert (row.split()[3] == "yes") == ("missing: " not in row)


def test_what_a_target_lacks_is_told(llmopt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Availability(runs="pip install 'llmopt[runtime]'")
    monkeypatch.setattr(OnnxRuntimeCpu, "available", lambda _: missing)

    shown = llmopt("targets").stdout
    targets = json.loads(llmopt("targets", "--json").stdout)["targets"]
    [target] = [target for target in targets if target["name"] == "onnxruntime-cpu"]

    assert "missing: pip install 'llmopt[runtime]'" in shown
    assert (target["builds"], target["runs"]) == (True, False)
    assert target["missing"] == ["pip install 'llmopt[runtime]'"]


def test_every_pass_is_listed_with_a_sentence(llmopt: Any) -> None:
    data = json.loads(llmopt("passes", "--json").stdout)

    found = {each["name"]: each for each in data["passes"]}
    assert set(PASSES) <= set(found)
    assert all(each["summary"].endswith(".") for each in found.values())
    assert data["default"] == list(DEFAULT)
    assert {name for name, each in found.items() if each["default"]} == set(DEFAULT)
    assert llmopt("passes").stdout.splitlines()[-1] == f"default = {','.join(DEFAULT)}"


def test_the_doctor_tells_versions_and_costs(
    llmopt: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = importlib.metadata.version

    def version(package: str) -> str:
        if package == "gguf":
            raise importlib.metadata.PackageNotFoundError(package)
        return known(package)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", version)
    shown = llmopt("doctor").stdout
    data = json.loads(llmopt("doctor", "--json").stdout)

    assert f"free in {tmp_path}" in shown
    assert "cores allowed" in shown
    [row] = [line for line in shown.splitlines() if line.startswith("gguf")]
    assert row.split()[1] == "missing"
    assert "GGUF files are not read; pip install 'llmopt[cpu]'" in row
    found = {each["name"]: each["version"] for each in data["packages"]}
    assert list(found) == list(doctor.PACKAGES)
    assert found["numpy"] == known("numpy")
    assert data["disk_free_bytes"] > 0


@pytest.mark.parametrize("module", [inspect, summary, text])
def test_examples_in_docstrings_hold(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


def test_small_numbers_keep_their_digits() -> None:
    assert [text.digits(x) for x in (0, 0.0123456, 5, 99.94, 999.7, 1e6, -0.5)] == [
        "0",
        "0.0123",
        "5.00",
        "99.9",
        "1000",
        "1000000",
        "-0.500",
    ]


def test_an_empty_table_is_its_header() -> None:
    assert text.table(["a", "b"], []) == "a  b"
    assert text.fields([]) == ""
