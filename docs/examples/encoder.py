"""A small sentence encoder, written by hand."""

import math

import torch
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """Layer normalization, its means spelled as sums."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        centered = x - x.sum(-1, keepdim=True) / width
        variance = (centered * centered).sum(-1, keepdim=True) / width
        return centered / torch.sqrt(variance + 1e-5) * self.weight + self.bias


class Layer(nn.Module):
    """Attention and a feed-forward network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
        scores = scores.masked_fill(attention_mask[:, None, None, :] == 0, float("-inf"))
        mixed = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
        x = self.norm1(x + self.out(mixed))
        y: Tensor = self.norm2(x + self.down(nn.functional.gelu(self.up(x))))
        return y


class Encoder(nn.Module):
    """Tokens in, hidden states out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(1000, 64), nn.Embedding(128, 64)
        self.layers = nn.ModuleList(Layer(64, 4) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x: Tensor = self.tokens(input_ids) + self.positions(positions)
        for layer in self.layers:
            x = layer(x, attention_mask)
        return x


def make() -> nn.Module:
    """Return the model; a real factory would load its weights here."""
    torch.manual_seed(0)
    return Encoder().eval()
