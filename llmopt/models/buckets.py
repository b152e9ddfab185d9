"""Buckets of distances, which index a relative position bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def distance_buckets(buckets: int, furthest: int, *, ahead: bool) -> Tensor:
    """Return the bucket of each distance from -furthest to furthest: [2 * furthest + 1] int64.

    Half of a direction's buckets are for single distances; the others widen logarithmically up to
    ``furthest``. A table, because a logarithm on another machine may fall on the other side of a
    bucket's edge.

    Args:
        buckets: Number of buckets.
        furthest: Distance from which all share the last bucket.
        ahead: Whether half of the buckets are for later keys; if not, those share bucket 0.

    Source: Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 2.1; Song et al. 2020,
    https://arxiv.org/abs/2004.09297.
    """
    distances = torch.arange(-furthest, furthest + 1)
    count = buckets // 2 if ahead else buckets
    away = distances.abs() if ahead else (-distances).clamp(min=0)
    exact = count // 2
    ratio = torch.log(away.clamp(min=1).float() / exact) / math.log(furthest / exact)
    far = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
    index = torch.where(away < exact, away, far)
    return index + (distances > 0) * count if ahead else index
