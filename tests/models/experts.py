"""A mixture of experts as one writes it by hand: every expert, weighed by its share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """A gated feed-forward."""

    def __init__(self, wide: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(wide, inner, bias=False)
        self.up = nn.Linear(wide, inner, bias=False)
        self.down = nn.Linear(inner, wide, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what it makes of x [.., wide]."""
        made: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return made


class Mixture(nn.Module):
    """Norm, experts, residual: [B, S, 48] to the same."""

    def __init__(self, experts: int = 5, chosen: int = 2) -> None:
        super().__init__()
        self.chosen = chosen
        self.norm = nn.LayerNorm(48)
        self.router = nn.Linear(48, experts, bias=False)
        self.experts = nn.ModuleList(Expert(48, 32) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        """Return x and what the experts add to it."""
        rows = self.norm(x)
        chances = self.router(rows).softmax(-1)
        top, index = torch.topk(chances, self.chosen)
        top = top / top.sum(-1, keepdim=True)
        made = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            share = (top * (index == number)).sum(-1, keepdim=True)
            made = made + share * expert(rows)
        return x + made


def make() -> nn.Module:
    """Return it with random weights."""
    torch.manual_seed(5)
    return Mixture()
