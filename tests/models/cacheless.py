"""Decoders written by hand, none of which knows of a cache: what llmopt has no definition of."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from gpt import perturbed
from torch import Tensor, nn
from typing_extensions import override

VOCABULARY, HIDDEN, HEADS, LONGEST = 97, 32, 4, 96
WIDTH: Final = HIDDEN // HEADS


def split_heads(x: Tensor, width: int = WIDTH) -> Tensor:
    """Return [B, S, H * D] as [B, H, S, D]."""
    return x.reshape(*x.shape[:2], -1, width).transpose(1, 2)


class Block(nn.Module):
    """Projections and a feed-forward network, for whoever has no other ones."""

    def __init__(self, keys: int = HIDDEN, *, bias: bool = True) -> None:
        super().__init__()
        self.q = nn.Linear(HIDDEN, HIDDEN, bias=bias)
        self.k = nn.Linear(HIDDEN, keys, bias=bias)
        self.v = nn.Linear(HIDDEN, keys, bias=bias)
        self.o = nn.Linear(HIDDEN, HIDDEN, bias=bias)
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 48), nn.Linear(48, HIDDEN)


class FusedQkv(nn.Module):
    """Pre-norm, one projection for all, a tril buffer in each layer, learned positions, tied."""

    tril: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(LONGEST, HIDDEN)
        self.blocks: Any = nn.ModuleList(Block() for _ in range(2))
        self.qkv: Any = nn.ModuleList(nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(2))
        self.register_buffer("tril", torch.tril(torch.ones(LONGEST, LONGEST)))

    @override
    def forward(self, idx: Tensor) -> Tensor:
        length = idx.shape[1]
        x = self.tokens(idx) + self.places(torch.arange(length))
        for block, qkv in zip(self.blocks, self.qkv, strict=True):
            q, k, v = map(split_heads, qkv(block.norm1(x)).chunk(3, -1))
            scores = q @ k.transpose(-2, -1) / math.sqrt(WIDTH)
            scores = scores.masked_fill(self.tril[:length, :length] == 0, float("-inf"))
            x = x + block.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = x + block.down(F.gelu(block.up(block.norm2(x))))
        logits: Tensor = x @ self.tokens.weight.T
        return logits


class ParallelAlibi(nn.Module):
    """Attention and feed-forward side by side, einsum, ALiBi made in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks: Any = nn.ModuleList(Block(bias=False) for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        place = torch.arange(tokens.shape[1])
        slopes = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1) / HEADS)
        bias = slopes[:, None, None] * (place[None, :] - place[:, None])
        bias = bias.masked_fill(place[None, :] > place[:, None], float("-inf"))
        x = self.tokens(tokens)
        for block in self.blocks:
            h = block.norm1(x)
            q, k, v = (f(h).unflatten(-1, (HEADS, WIDTH)) for f in (block.q, block.k, block.v))
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * WIDTH**-0.5 + bias
            mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
            x = x + block.o(mixed) + block.down(F.silu(block.up(h)))
        logits: Tensor = self.head(x)
        return logits


class EncoderLayers(nn.Module):
    """nn.TransformerEncoder, post-norm, with the mask that torch makes for it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(LONGEST, HIDDEN)
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, 48, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    @override
    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.tokens(input_ids) + self.places(torch.arange(length))[None]
        logits: Tensor = self.head(self.layers(x, mask=mask, is_causal=True))
        return logits


class RotaryBuffer(nn.Module):
    """Rotary from a buffer that all layers share, fewer key heads, SDPA, wide enough for GQA."""

    cos: Tensor
    sin: Tensor
    WIDE: Final = 16

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks: Any = nn.ModuleList(Block(self.WIDE, bias=False) for _ in range(2))
        self.norms: Any = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        angles = torch.outer(torch.arange(LONGEST), 100.0 ** (-torch.arange(8) / 8)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @override
    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat([-second, first], -1) * sin

        x = self.tokens(input_ids)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            h = norm(x)
            q, k, v = (split_heads(f(h), self.WIDE) for f in (block.q, block.k, block.v))
            k, v = (part.repeat_interleave(2, 1) for part in (turned(k), v))
            y = F.scaled_dot_product_attention(turned(q), k, v, is_causal=True)
            x = x + block.o(y.transpose(1, 2).flatten(2))
            x = x + block.down(F.silu(block.up(block.norm2(x))))
        logits: Tensor = x @ self.tokens.weight.T
        return logits


class SlidingWindow(nn.Module):
    """Post-norm, products of rank 3, a window, a padding mask, a table looked up by its sum."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks: Any = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        waves = torch.outer(torch.arange(LONGEST), 50.0 ** (-torch.arange(HIDDEN) / HIDDEN))
        self.register_buffer("table", waves.sin())

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        batch, length = input_ids.shape
        x = self.tokens(input_ids) + self.table[(attention_mask.cumsum(1) - 1).clamp(min=0)]
        place = torch.arange(length)
        apart = place[:, None] - place[None, :]
        seen = ((apart >= 0) & (apart < 5))[None] & attention_mask[:, None, :].bool()
        bias = torch.where(seen, 0.0, -1e9)[:, None]
        for block in self.blocks:
            q, k, v = (split_heads(f(x)).flatten(0, 1) for f in (block.q, block.k, block.v))
            scores = (torch.bmm(q, k.transpose(1, 2)) / WIDTH**0.5).view(batch, HEADS, length, -1)
            weights = (scores + bias).softmax(-1).flatten(0, 1)
            y = torch.bmm(weights, v).view(batch, HEADS, length, WIDTH).transpose(1, 2).flatten(2)
            x = block.norm1(x + block.o(y))
            x = block.norm2(x + block.down(F.relu(block.up(x))))
        logits: Tensor = self.head(x)
        return logits


class TokensFirst(nn.Module):
    """nn.MultiheadAttention on [S, B, E], a parameter of positions, a mask of triu."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.places = nn.Parameter(torch.zeros(1, LONGEST, HIDDEN))
        self.attention: Any = nn.ModuleList(nn.MultiheadAttention(HIDDEN, HEADS) for _ in range(2))
        self.norms: Any = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    @override
    def forward(self, src: Tensor) -> Tensor:
        length = src.shape[1]
        x = (self.tokens(src) + self.places[:, :length]).transpose(0, 1)
        mask = torch.full((length, length), float("-inf")).triu(1)
        for attention, norm in zip(self.attention, self.norms, strict=True):
            h = norm(x)
            x = x + attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        logits: Tensor = self.head(x.transpose(0, 1))
        return logits


class OneKeyHead(nn.Module):
    """One head of keys, rotary of neighbours, capped scores, norms written out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks: Any = nn.ModuleList(Block(WIDTH, bias=False) for _ in range(2))
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(HIDDEN)) for _ in range(2))

    @override
    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        angles = torch.arange(length)[:, None] * 100.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
        cos, sin = angles.cos(), angles.sin()
        later = torch.ones(length, length, dtype=torch.bool).triu(1)

        def turned(x: Tensor) -> Tensor:
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

        x = self.tokens(input_ids) * HIDDEN**0.5
        for block, gain in zip(self.blocks, self.gains, strict=True):
            h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * gain
            q, k, v = turned(split_heads(block.q(h))), turned(block.k(h)), block.v(h)
            scores = 20 * torch.tanh(torch.einsum("bhqd,bkd->bhqk", q, k) * WIDTH**-0.5 / 20)
            weights = scores.masked_fill(later, torch.finfo(scores.dtype).min).softmax(-1)
            x = x + block.o(torch.einsum("bhqk,bkd->bqhd", weights, v).flatten(2))
        logits: Tensor = x @ self.tokens.weight.T
        return logits


class KeyBias(nn.Module):
    """A bias of keys alone, counted from the last one; a norm of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks: Any = nn.ModuleList(Block() for _ in range(2))
        self.heads = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    @override
    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        slopes = 0.5 ** torch.arange(1, HEADS + 1)
        bias = slopes[:, None, None] * torch.arange(1 - length, 1)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        bias = bias.masked_fill(later, torch.finfo(torch.float32).min)
        x = self.tokens(input_ids)
        for block in self.blocks:
            h = block.norm1(x)
            q, k, v = (split_heads(f(h)) for f in (block.q, block.k, block.v))
            y = F.scaled_dot_product_attention(self.heads(q), self.heads(k), v, attn_mask=bias)
            x = x + block.o(y.transpose(1, 2).flatten(2))
            x = x + block.down(F.gelu(block.up(block.norm2(x)), approximate="tanh"))
        logits: Tensor = self.head(x)
        return logits


DECODERS: Final = (
    *(FusedQkv, ParallelAlibi, EncoderLayers, RotaryBuffer),
    *(SlidingWindow, TokensFirst, OneKeyHead, KeyBias),
)


def make(kind: type[nn.Module], seed: int = 1) -> nn.Module:
    """Return a decoder in which no parameter has its initial value, and layers count for much."""
    torch.manual_seed(seed)
    made = perturbed(kind(), seed).eval()
    with torch.no_grad():
        for part in made.modules():
            if isinstance(part, nn.Linear) and part.out_features != VOCABULARY:
                part.weight *= 3  # else a token mostly follows itself
    return made
