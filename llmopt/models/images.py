"""Features of images, inserted in place of image tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def with_images(embeds: Tensor, input_ids: Tensor, features: Tensor, image_token: int) -> Tensor:
    """Return embeddings [B, S, E] with features in index of image tokens, row by row.

    An image token without a feature keeps its own embedding, for example one that the model
    generates.

    Args:
        embeds: [B, S, E], embeddings of all tokens.
        input_ids: [B, S] int64.
        features: [I, N, E] of I images, in the order of their tokens; I may be 0.
        image_token: Token that is the placeholder of one feature.
    """
    rows = features.flatten(0, 1)
    is_image = input_ids == image_token
    index = is_image.flatten().to(torch.int64).cumsum(0).view_as(input_ids)  # from 1 on
    replaced = is_image & (index <= rows.shape[0])
    # row 0 is a dummy, so that a lookup works without features
    table = torch.cat((rows.new_zeros(1, rows.shape[1]), rows))
    inserted = functional.embedding(torch.where(replaced, index, 0), table)
    return torch.where(replaced[..., None], inserted, embeds)
