"""Encoders that take their heads apart in the ways that people do, each in a block of its own."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from gpt import perturbed
from torch import Tensor, nn
from typing_extensions import override

VOCABULARY, HIDDEN, HEADS = 37, 32, 4
WIDTH: Final = HIDDEN // HEADS


class Unbound(nn.Module):
    """[3, heads, width] permuted to the front and unbound, as vision models do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    @override
    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts.unbind(0))
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(batch, tokens, HIDDEN))
        return mixed


class PartlyScaled(nn.Module):
    """[heads, 3 * width] in one transpose; a norm of each head; half of each head is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.norm = nn.RMSNorm(WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH // 2))

    @override
    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).view(*x.shape[:2], HEADS, 3 * WIDTH).transpose(1, 2)
        q, k, v = heads.chunk(3, -1)
        first, second = self.norm(q).chunk(2, -1)
        q = torch.cat([first * self.scale, second.tanh()], -1)
        y = F.scaled_dot_product_attention(q, self.norm(k), v)
        mixed: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return mixed


class TokensFirst(nn.Module):
    """nn.MultiheadAttention on [S, B, E]: heads are found where batch and heads are one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS)

    @override
    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(0, 1)
        mixed: Tensor = self.attention(turned, turned, turned, need_weights=False)[0]
        return mixed.transpose(0, 1)


BLOCKS: Final = (Unbound, PartlyScaled, TokensFirst)


class Encoder(nn.Module):
    """Token ids to hidden states, a block of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(kind() for kind in BLOCKS)
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in BLOCKS)

    @override
    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.tokens(input_ids)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + block(norm(x))
        return x


def make() -> nn.Module:
    """Return an encoder in which no parameter has its initial value."""
    return perturbed(Encoder(), seed=4).eval()
