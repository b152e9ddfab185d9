"""Rotary position tables, computed from positions in the forward pass.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; the scalings: Peng et al. 2023 (yarn),
https://arxiv.org/abs/2309.00071; Ding et al. 2024 (longrope), https://arxiv.org/abs/2402.13753;
Llama Team 2024 (llama3), https://arxiv.org/abs/2407.21783.
"""

from __future__ import annotations

import math

import torch
from typing_extensions import override

from llmopt.models.config import Rope


class RotaryTable(torch.nn.Module):
    """Cosines and sines of positions; the frequencies are never on the meta device.

    Args:
        rope: Rotary setting.
    """

    frequencies: torch.Tensor
    long_frequencies: torch.Tensor

    def __init__(self, rope: Rope) -> None:
        super().__init__()
        self.rope = rope
        with torch.device("cpu"):
            frequencies = inverse_frequencies(rope)
            self.register_buffer("frequencies", frequencies, persistent=False)
            if rope.kind == "longrope":
                divisors = torch.tensor(rope.long, dtype=torch.float32)
                longer = _base(rope) / divisors
                self.register_buffer("long_frequencies", longer, persistent=False)

    @override
    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [B, S, width] of ``position_ids`` [B, S]."""
        frequencies = self.frequencies
        if self.rope.kind == "longrope":
            # one set for the batch, by its furthest position, as in training
            longer = position_ids.max() >= self.rope.original_length
            frequencies = torch.where(longer, self.long_frequencies, frequencies)
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        if self.rope.amplitude == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * self.rope.amplitude, angles.sin() * self.rope.amplitude


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return ``x`` [B, H, S, D] with the first channels, up to the width of ``cos``, rotated."""
    cos, sin = cos[:, None], sin[:, None]
    width = cos.shape[-1]
    if width == x.shape[-1]:
        return x * cos + rotate_half(x) * sin
    rotary, kept = x[..., :width], x[..., width:]
    return torch.cat((rotary * cos + rotate_half(rotary) * sin, kept), dim=-1)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Return the halves of the last axis swapped, the second negated."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def inverse_frequencies(rope: Rope) -> torch.Tensor:
    """Return the angle per position of each pair of channels: [width / 2] float32.

    For longrope, the frequencies up to the original length.
    """
    base = _base(rope)
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(base, rope)
    if rope.kind == "yarn":
        return _yarn(base, rope)
    if rope.kind == "longrope":
        return base / torch.tensor(rope.short, dtype=torch.float32)
    return base


def _base(rope: Rope) -> torch.Tensor:
    exponents = torch.arange(0, rope.width, 2, dtype=torch.float32) / rope.width
    return 1.0 / rope.theta**exponents


def _llama3(base: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Keep high frequencies, divide low ones by the factor, blend those between."""
    rotations = rope.original_length * base / (2 * math.pi)  # in the training length
    kept = ((rotations - rope.low) / (rope.high - rope.low)).clamp(0, 1)
    return kept * base + (1 - kept) * base / rope.factor


def _yarn(base: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Like llama3, but blended along the channels between two numbers of rotations."""
    low, high = (_channel(rope, rotations) for rotations in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.width - 1)
    if low == high:
        high += 0.001  # a ramp of no length would divide by zero
    channels = torch.arange(rope.width // 2, dtype=torch.float32)
    scaled = ((channels - low) / (high - low)).clamp(0, 1)
    return scaled * base / rope.factor + (1 - scaled) * base


def _channel(rope: Rope, rotations: float) -> float:
    """Return the pair of channels with this number of rotations in the training length."""
    wavelength = rope.original_length / (rotations * 2 * math.pi)
    return rope.width * math.log(wavelength) / (2 * math.log(rope.theta))
