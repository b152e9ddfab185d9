"""Features of images in the place of tokens that stand for them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def with_images(embeds: Tensor, input_ids: Tensor, features: Tensor, image_token: int) -> Tensor:
    """Return embeddings [B, S, E] with features where image tokens stand, row by row.

    A token that no feature is left for keeps its own embedding, as one does that a model writes
    itself.

    Args:
        embeds: [B, S, E], of every token.
        input_ids: [B, S] int64.
        features: [I, N, E] of I images, in the order in which their tokens stand; I may be 0.
        image_token: The token that stands for one feature.
    """
    rows = features.flatten(0, 1)
    stands = input_ids == image_token
    place = stands.flatten().to(torch.int64).cumsum(0).view_as(input_ids)  # from 1 on
    shown = stands & (place <= rows.shape[0])
    # row 0 is nobody's: there is one to be looked up where there are no features
    table = torch.cat((rows.new_zeros(1, rows.shape[1]), rows))
    found = functional.embedding(torch.where(shown, place, 0), table)
    return torch.where(shown[..., None], found, embeds)
