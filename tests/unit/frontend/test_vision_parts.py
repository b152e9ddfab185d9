"""Vision-language models are recognized by their parts, or refused with what they have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from llmopt.errors import UnsupportedModelError
from llmopt.frontend.huggingface.vision_parts import Connected, Tower, is_vision_language, parts_of


class Whole(nn.Module):
    """A model of parts by these names.

    Args:
        names: They.
        config: More that its config says.
    """

    def __init__(self, *names: str, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_token_id=3, **config)
        self.model = nn.Module()
        for name in names:
            self.model.add_module(name, nn.Identity())
        self.head = nn.Linear(2, 2)

    def get_image_features(self) -> None:
        """Be one that is_vision_language."""

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.head


def test_a_model_sees_if_it_has_an_image_token_features_and_a_head() -> None:
    assert is_vision_language(Whole("language_model"))
    assert not is_vision_language(Whole("language_model", is_encoder_decoder=True))
    blind = Whole("language_model")
    blind.config.image_token_id = None
    assert not is_vision_language(blind)


def test_the_two_ways_to_features_are_told_apart() -> None:
    chosen = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    tower = parts_of(Whole("vision_tower", "multi_modal_projector", "language_model", **chosen), "")
    assert isinstance(tower.vision, Tower)
    assert not tower.nested
    connected = parts_of(Whole("vision_model", "connector", "text_model"), "")
    assert isinstance(connected.vision, Connected)
    assert connected.nested


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("visual", "language_model"), r"it has language_model, visual \(known: vision_tower"),
        (("vision_tower", "multi_modal_projector", "language_model"), "unknown path"),
        (("vision_model", "connector", "writer"), "no language_model or text_model"),
    ],
)
def test_what_is_made_of_other_parts_is_refused(names: tuple[str, ...], problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=problem):
        parts_of(Whole(*names), "other")
