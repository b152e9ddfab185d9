"""Rotary settings: what a config says, and what each scaling does to the frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from llmopt.errors import UnsupportedModelError
from llmopt.models.config import Rope
from llmopt.models.rope import RotaryTable, inverse_frequencies, rotate, rotate_half
from llmopt.models.rope_config import parse_rope

CONFIG: Mapping[str, Any] = {"model_type": "llama", "max_position_embeddings": 64}
PLAIN = Rope(8, 10000.0)


def test_plain_frequencies_are_a_geometric_series() -> None:
    found = inverse_frequencies(PLAIN).double()
    torch.testing.assert_close(found, 10000.0 ** -torch.arange(0, 1, 0.25, dtype=torch.float64))


def test_llama3_keeps_short_waves_and_divides_long_ones() -> None:
    rope = parse_rope(CONFIG, _LLAMA3, 8, 10000.0)
    ratio = inverse_frequencies(rope) / inverse_frequencies(PLAIN)
    assert ratio[0] == 1.0
    assert ratio[-1] == pytest.approx(1 / 8)
    assert 1 / 8 < ratio[1] < 1


def test_yarn_of_an_empty_ramp_divides_by_no_zero() -> None:
    rope = Rope(8, 10000.0, "yarn", factor=4.0, original_length=4.0)
    assert inverse_frequencies(rope).isfinite().all()


def test_longrope_changes_at_the_length_trained_for() -> None:
    rope = Rope(4, 100.0, "longrope", original_length=6, short=(1, 1), long=(2, 4), amplitude=3.0)
    table = RotaryTable(rope)
    near, far = torch.tensor([[0, 5]]), torch.tensor([[5, 6]])
    base = torch.tensor([1.0, 0.1])

    torch.testing.assert_close(table(near)[0][0, 1], 3 * (5 * base.repeat(2)).cos())
    longer = 5 * (base / torch.tensor([2.0, 4.0])).repeat(2)
    torch.testing.assert_close(table(far)[1][0, 0], 3 * longer.sin())


def test_tables_are_computed_for_real_inside_a_meta_context() -> None:
    with torch.device("meta"):
        table = RotaryTable(PLAIN)
    assert table.frequencies.device.type == "cpu"
    assert "frequencies" not in table.state_dict()


def test_a_part_of_the_head_rotates_and_the_rest_stays() -> None:
    x = torch.randn(2, 3, 5, 10, generator=torch.Generator().manual_seed(0))
    cos, sin = RotaryTable(PLAIN)(torch.arange(5)[None].expand(2, 5))
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert torch.equal(turned[..., :8], rotate(x[..., :8], cos, sin))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_half_rotation_twice_negates() -> None:
    x = torch.arange(6.0)
    assert rotate_half(x).tolist() == [-3, -4, -5, 0, 1, 2]
    assert torch.equal(rotate_half(rotate_half(x)), -x)


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 100,
}
_LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("params", "fields"),
    [
        pytest.param({"type": "linear", "factor": 2}, {"factor": 2.0}, id="old name"),
        pytest.param({"rope_type": "default", "rope_theta": 5}, {"theta": 5.0}, id="own theta"),
        pytest.param(
            {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
            {"factor": 4.0, "amplitude": pytest.approx(1.138629436)},
            id="yarn's factor from lengths",
        ),
        pytest.param(
            {"rope_type": "yarn", "factor": 0.5}, {"amplitude": 1.0}, id="yarn that shrinks"
        ),
        pytest.param(
            {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5, "beta_fast": 7},
            {"amplitude": 1.5, "beta_fast": 7.0, "original_length": 64.0},
            id="yarn's own amplitude",
        ),
        pytest.param(_LONG, {"amplitude": 1.0, "original_length": 64.0}, id="longrope unstretched"),
        pytest.param(_LONG | {"attention_factor": 1.25}, {"amplitude": 1.25}, id="longrope given"),
        pytest.param(
            _LONG | {"factor": 64.0}, {"amplitude": pytest.approx(2**0.5)}, id="longrope factor"
        ),
    ],
)
def test_reads(params: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    rope = parse_rope(CONFIG, params, 8, 10000.0)
    assert {name: getattr(rope, name) for name in fields} == fields


def test_a_trained_length_beside_the_rotary_settings_comes_first() -> None:
    config = {**CONFIG, "original_max_position_embeddings": 32}
    assert parse_rope(config, _LLAMA3, 8, 10000.0).original_length == 32


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        pytest.param({"rope_type": "dynamic", "factor": 2.0}, "change as the sequence", id="ntk"),
        pytest.param({"rope_type": "mrope"}, "rope type 'mrope' (known: default", id="unknown"),
        pytest.param({"rope_type": "linear"}, "'linear' without 'factor'", id="no factor"),
        pytest.param(_LONG | {"long_factor": [1.0]}, "4 short and 1 long", id="too few factors"),
    ],
)
def test_refuses(params: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        parse_rope(CONFIG, params, 8, 10000.0)
    assert reason in str(caught.value)
