"""A BERT written by hand: separate projections, an additive padding mask, norms after."""

from __future__ import annotations

import math

import torch
from gpt import LayerNorm, perturbed
from torch import Tensor, nn
from typing_extensions import override

VOCABULARY, HEADS, WIDTH, LAYERS, LONGEST, FORWARD, TYPES = 31, 3, 8, 2, 48, 56, 2
HIDDEN = HEADS * WIDTH


class Block(nn.Module):
    """Attention and a feed-forward network, normalized after."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, HIDDEN)
        self.key = nn.Linear(HIDDEN, HIDDEN)
        self.value = nn.Linear(HIDDEN, HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.norm1 = LayerNorm(HIDDEN, 1e-6)
        self.up = nn.Linear(HIDDEN, FORWARD)
        self.down = nn.Linear(FORWARD, HIDDEN)
        self.norm2 = LayerNorm(HIDDEN, 1e-6)

    def heads(self, x: Tensor) -> Tensor:
        """Return [B, S, H * D] as [B, H, S, D]."""
        return x.view(x.shape[0], x.shape[1], HEADS, WIDTH).permute(0, 2, 1, 3)

    @override
    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        scores = torch.matmul(q / math.sqrt(WIDTH), k.transpose(2, 3)) + bias
        y = torch.matmul(scores.softmax(-1), v).permute(0, 2, 1, 3).contiguous()
        x = self.norm1(x + self.out(y.view(x.shape[0], x.shape[1], HIDDEN)))
        result: Tensor = self.norm2(x + self.down(nn.functional.gelu(self.up(x))))
        return result


class Bert(nn.Module):
    """Token ids and a padding mask to hidden states."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, HIDDEN)
        self.positions = nn.Embedding(LONGEST, HIDDEN)
        self.types = nn.Embedding(TYPES, HIDDEN)
        self.norm = LayerNorm(HIDDEN, 1e-6)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.register_buffer("order", torch.arange(LONGEST)[None])

    @override
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> dict[str, Tensor]:
        x = self.words(input_ids) + self.types(token_type_ids)
        x = self.norm(x + self.positions(self.order[:, : input_ids.shape[1]]))
        bias = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        for block in self.blocks:
            x = block(x, bias)
        return {"last_hidden_state": x}


def make() -> nn.Module:
    """Return a BERT in which no parameter has its initial value."""
    module: nn.Module = perturbed(Bert(), seed=2)
    return module
