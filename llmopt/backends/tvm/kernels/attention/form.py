"""Which attention is wanted: heads, what a query may see, where keys are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

MASKED: Final = -3e38
"""Score of a key that may not be seen: far below `UNSEEN`, so its weight is exactly 0."""
UNSEEN: Final = -1e30
"""The largest score before any was seen; finite, so a row that sees nothing stays finite."""


@dataclass(frozen=True)
class AttentionForm:
    """Attention of a layer: ``softmax(scale * Q Kᵀ) V`` for each head.

    Query s of S sees key t of T if ``P + s - left <= t <= P + s + right``, P = T - S, and if t is
    no padding. Head h reads key head h // (heads / kv_heads).

    Args:
        heads: H, query heads.
        kv_heads: G, key heads; divides H.
        width: D, numbers in a head.
        causal: Whether a query sees no later key (then ``right`` is 0).
        left: Number of earlier keys that a query attends to; None for all.
        right: Number of later keys that a query attends to; None for all.
        softcap: Scores become ``softcap * tanh(score / softcap)`` if it is not 0.
        scale: Scale of the scores; None is 1 / √D.
        masked: Whether keys may be padding. Only then is the mask read; its shape always is.
        cached: Whether keys and values are in caches [B, G, C, D] of which the first T are in use.
        packed: Whether Q, K and V are parts of one row [H·D + 2·G·D]; without a cache.
        rounded: Whether products may be of bfloat16 where the processor has an instruction for it,
            twice as fast; sums and softmax stay float32. Not for one token: that waits for memory.
    """

    heads: int
    kv_heads: int
    width: int
    causal: bool = False
    left: int | None = None
    right: int | None = None
    softcap: float = 0.0
    scale: float | None = None
    masked: bool = True
    cached: bool = False
    packed: bool = False
    rounded: bool = False

    @property
    def ratio(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def later(self) -> int | None:
        """How many later keys a query sees; None for all."""
        return 0 if self.causal else self.right

    @property
    def factor(self) -> float:
        """What queries are multiplied by: the scale, times log2(e) where nothing is in between."""
        scale = 1.0 / math.sqrt(self.width) if self.scale is None else self.scale
        return scale if self.softcap else scale * math.log2(math.e)

    @property
    def label(self) -> str:
        """What it is, as part of a name."""
        parts = [f"h{self.heads}", f"g{self.kv_heads}", f"d{self.width}"]
        flags = ("causal", "masked", "cached", "packed", "rounded")
        parts += [flag for flag in flags if getattr(self, flag)]
        parts += [
            f"{name}{n}" for name in ("left", "right") if (n := getattr(self, name)) is not None
        ]
        if self.softcap:
            parts.append(f"cap{self.softcap:g}")
        if self.scale is not None:
            parts.append(f"scale{self.scale:.9g}")
        return "_".join(parts).replace(".", "p").replace("-", "m")
