"""Features of images go where image tokens stand, in their order."""

from __future__ import annotations

import torch

from llmopt.models.images import with_images

IMAGE, WIDTH = 7, 3


def place(ids: list[list[int]], images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return embeddings, features [images, 2, WIDTH], and embeddings with features in them."""
    tokens = torch.tensor(ids)
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(*tokens.shape, WIDTH, generator=generator)
    features = torch.randn(images, 2, WIDTH, generator=generator)
    return embeds, features, with_images(embeds, tokens, features, IMAGE)


def test_features_are_taken_row_by_row() -> None:
    embeds, features, found = place([[1, 7, 7, 2], [7, 3, 7, 4]], images=2)
    first, second = features
    wanted = embeds.clone()
    wanted[0, 1:3] = first
    wanted[1, 0], wanted[1, 2] = second
    assert torch.equal(found, wanted)


def test_a_token_that_no_feature_is_left_for_keeps_its_own_embedding() -> None:
    embeds, features, found = place([[7, 1, 7, 7]], images=1)
    assert torch.equal(found[0, [0, 2]], features[0])
    assert torch.equal(found[0, [1, 3]], embeds[0, [1, 3]])


def test_without_images_nothing_changes() -> None:
    embeds, _, found = place([[7, 1], [2, 7]], images=0)
    assert torch.equal(found, embeds)
