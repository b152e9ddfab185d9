"""The suite of peers: who takes part in a case, what is left out, and its page."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import suite
import vs_peers


def test_every_peer_has_a_side_and_every_side_a_peer() -> None:
    starts = ("tvm-cpu", "onnxruntime-cpu", *(peer.sides for peer in suite.PEERS.values()))
    sides = {side for _, of in vs_peers.CASES.values() for side in of}
    assert all(side.startswith(starts) for side in sides)
    for peer in suite.PEERS.values():
        assert any(side.startswith(peer.sides) for side in sides)


def test_sides_live_in_the_environment_of_their_peer() -> None:
    for peer in suite.PEERS.values():
        for _, of in vs_peers.CASES.values():
            found = {s.foreign for name, s in of.items() if name.startswith(peer.sides)}
            assert found <= {peer.environment, vs_peers.LLAMACPP_AVX2}


def test_only_peers_that_were_asked_for_take_part() -> None:
    chosen = suite.sides_of("smollm2", ["torch"])
    assert chosen == ["tvm-cpu w4", "onnxruntime-cpu w4", "torch fp32", "torch.compile fp32"]
    assert suite.chosen_peers("all") == list(suite.PEERS)
    assert suite.chosen_peers("torch,genai") == ["torch", "genai"]
    with pytest.raises(SystemExit, match="peer 'tourch' is none of llamacpp"):
        suite.chosen_peers("tourch")


def test_a_peer_that_cannot_be_installed_is_named_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def install(peer: Any, _: Path) -> None:
        asked.append(peer.environment)
        if peer.environment == vs_peers.OLIVE:
            raise subprocess.CalledProcessError(1, "pip")
        (tmp_path / peer.environment).mkdir()

    monkeypatch.setattr(suite, "_install", install)
    names = ["torch", "ctranslate2", "olive"]
    assert suite.installed(names, tmp_path) == ["torch", "ctranslate2"]
    assert "olive could not be installed and is left out" in capsys.readouterr().err
    suite.installed(names, tmp_path)
    assert asked == [vs_peers.CTRANSLATE2, vs_peers.OLIVE, vs_peers.OLIVE]


def test_the_page_carries_its_rows() -> None:
    row = {"workload": "decode", "side": "torch <fp32>", "tokens_per_s": 12.5, "roofline": 0.25}
    rows = [row | {"side": "tvm-cpu w4", "tokens_per_s": 50.0}, row]
    for each, ratio in zip(rows, ([1.0, 1.0, 1.0], [4.0, 3.5, 4.5]), strict=True):
        each["ours_to_it"] = ratio
    everything = {"machine": {"processor": "a chip"}, "threads": 2}
    everything["results"] = [{"case": "smollm2", "rows": rows}]
    text = suite.page(everything)

    (carried,) = re.findall(r'<script type="application/json" id="result">(.*?)</script>', text)
    assert json.loads(carried) == everything
    assert "torch &lt;fp32&gt;" in text
    assert "ours is 4.00 times it [3.50, 4.50], 25 % of the limit" in text
    assert 'style="width:25.0%"' in text
