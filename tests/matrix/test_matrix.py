"""What ``make matrix`` shows of every family, held of a few; and that a bad row looks bad."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matrix import RESULTS, measure, right
from matrix_families import FAMILIES, QUICK, SLOW, THOROUGH, Family

_DEARER = [(name, pytest.mark.slow) for name in SLOW]
_DEARER += [(name, pytest.mark.thorough) for name in THOROUGH]


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=mark) for name, mark in _DEARER)]
)
def test_a_family_is_traced_fused_and_right_on_both_targets(name: str, tmp_path: Path) -> None:
    row = measure(FAMILIES[name], tmp_path, schemes=["fp32"])

    assert row["traced"], row
    assert right(row), row["errors"]
    assert row["misses"] == []
    assert all(found == expected for expected, found in row["fused"].values()), row["fused"]
    assert row["cache"] == ("yes" if FAMILIES[name].writes else "")


def test_a_family_that_is_not_known_is_a_row_with_a_reason(tmp_path: Path) -> None:
    vision = Family("resnet", "vision", {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]})

    row = measure(vision, tmp_path)

    assert not right(row)
    assert not row["traced"]
    assert "image_size" in row["reason"]


def test_the_results_that_the_docs_show_are_right_or_say_why() -> None:
    rows = json.loads(RESULTS.read_text())["rows"]

    assert {row["family"] for row in rows} <= set(FAMILIES)
    assert all(right(row) or row.get("reason") or row["misses"] for row in rows)


def test_a_family_that_nobody_named_is_refused() -> None:
    script = Path(RESULTS).with_name("matrix.py")
    asked = subprocess.run(
        [sys.executable, str(script), "nobodys"], capture_output=True, text=True, check=False
    )

    assert asked.returncode == 2
    assert "no family nobodys" in asked.stderr
