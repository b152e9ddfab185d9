"""A GPT written by hand: its own attention, layer normalization, positions and tril mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import override

VOCABULARY, HEADS, WIDTH, LAYERS, LONGEST, FORWARD = 29, 3, 8, 2, 64, 80
HIDDEN = HEADS * WIDTH


class LayerNorm(nn.Module):
    """Layer normalization of the last axis, written out."""

    def __init__(self, width: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.epsilon = epsilon

    @override
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + self.epsilon) * self.weight + self.bias


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V, below the diagonal."""

    tril: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("tril", torch.tril(torch.ones(LONGEST, LONGEST)))

    @override
    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).split(HIDDEN, dim=-1)
        q = q.view(batch, tokens, HEADS, WIDTH).transpose(1, 2)
        k = k.view(batch, tokens, HEADS, WIDTH).transpose(1, 2)
        v = v.view(batch, tokens, HEADS, WIDTH).transpose(1, 2)
        scores = q @ k.transpose(-2, -1) / math.sqrt(WIDTH)
        scores = scores.masked_fill(self.tril[:tokens, :tokens] == 0, float("-inf"))
        y = torch.softmax(scores, dim=-1) @ v
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(batch, tokens, HIDDEN))
        return mixed


class Block(nn.Module):
    """Attention and a feed-forward network, normalized before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = LayerNorm(HIDDEN)
        self.attention = Attention()
        self.norm2 = LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, FORWARD)
        self.down = nn.Linear(FORWARD, HIDDEN)
        self.dropout = nn.Dropout(0.1)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        result: Tensor = x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm2(x)))))
        return result


class Gpt(nn.Module):
    """Token ids to logits; embedding and head are one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.positions = nn.Embedding(LONGEST, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    @override
    def forward(self, idx: Tensor) -> Tensor:
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def make() -> nn.Module:
    """Return a GPT in which no parameter has its initial value."""
    return perturbed(Gpt(), seed=1)


def perturbed(module: nn.Module, seed: int) -> nn.Module:
    """Move every parameter from its initial value, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]) + (parameter.dim() == 1) * 0.5)
    return module
