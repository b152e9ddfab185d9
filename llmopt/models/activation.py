"""Activation functions."""

from __future__ import annotations

import torch
from torch.nn import functional

from llmopt.models.config import Activation


def activate(kind: Activation, x: torch.Tensor) -> torch.Tensor:
    """Return the activation of every element of ``x``."""
    if kind == "silu":
        return functional.silu(x)
    if kind == "relu":
        return functional.relu(x)
    return functional.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
