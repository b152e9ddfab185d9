"""Layers of encoder-decoders."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from llmopt.models.config import EncoderDecoderConfig, LayerConfig
from llmopt.models.decoder import FeedForward

Pair = tuple[Tensor, Tensor]  # key and value, each [B, H, tokens, D]


class Bias(nn.Module):
    """A bias that is added to every row.

    Args:
        width: Size of the bias.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(1, width))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return [..., width] for ``x`` [..., width]."""
        return x + self.bias


class AudioConvolutions(nn.Module):
    """Two convolutions over time, the second with stride 2.

    Args:
        bands: Frequency bands.
        hidden: Width of the embedding.
    """

    def __init__(self, bands: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(bands, hidden, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(hidden, hidden, kernel_size=3, stride=2, padding=1)

    @override
    def forward(self, features: Tensor) -> Tensor:
        """Return [B, C, E] for features [B, bands, 2 * C]."""
        hidden = functional.gelu(self.conv1(features))
        return functional.gelu(self.conv2(hidden)).permute(0, 2, 1)


class Layer(nn.Module):
    """Attention and feed-forward: a layer of the encoder.

    Args:
        config: Config of the model.
        kind: Config of the layer.
    """

    def __init__(self, config: EncoderDecoderConfig, kind: LayerConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.attention_norm = norm(config)
        self.attention = MultiHeadAttention(config, kind)
        self.feed_forward_norm = norm(config)
        self.feed_forward = FeedForward(config.hidden, kind)

    @override
    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Return the next hidden states [B, C, E]."""

        def attend(x: Tensor) -> Tensor:
            result: Tensor = self.attention(x, self.attention.pair(x), mask)
            return result

        hidden = self.add(hidden, self.attention_norm, attend)
        return self.add(hidden, self.feed_forward_norm, self.feed_forward)

    def add(self, x: Tensor, normalize: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``x`` plus ``part`` of it, normalized before or after."""
        if self.norm_first:
            return x + part(normalize(x))
        normed: Tensor = normalize(x + part(x))
        return normed


class CachedLayer(Layer):
    """Attention, cross-attention and feed-forward: a layer of the decoder, with a KV cache.

    Args:
        config: Config of the model.
        kind: Config of the layer.
    """

    def __init__(self, config: EncoderDecoderConfig, kind: LayerConfig) -> None:
        super().__init__(config, kind)
        self.cross_attention_norm = norm(config)
        self.cross_attention = MultiHeadAttention(config, kind)

    @override
    def forward(  # type: ignore[override] # a layer of the decoder takes more
        self, hidden: Tensor, mask: Tensor, past: Pair, memory: Pair, source_mask: Tensor | None
    ) -> tuple[Tensor, Pair]:
        """Return the next hidden states [B, S, E], and keys and values with the new ones.

        Args:
            hidden: [B, S, E].
            mask: Mask or bias from ``EncoderDecoder.context``.
            past: Keys and values [B, H, P, D].
            memory: Keys and values of the encoder's output, [B, H, C, D].
            source_mask: [B, 1, 1, C] bool, false for padding; None without padding.
        """
        present: list[Tensor] = []

        def attend(x: Tensor) -> Tensor:
            new = self.attention.pair(x)
            present.extend(torch.cat(parts, dim=2) for parts in zip(past, new, strict=True))
            result: Tensor = self.attention(x, (present[0], present[1]), mask)
            return result

        def cross_attend(x: Tensor) -> Tensor:
            result: Tensor = self.cross_attention(x, memory, source_mask)
            return result

        hidden = self.add(hidden, self.attention_norm, attend)
        hidden = self.add(hidden, self.cross_attention_norm, cross_attend)
        hidden = self.add(hidden, self.feed_forward_norm, self.feed_forward)
        return hidden, (present[0], present[1])


class MultiHeadAttention(nn.Module):
    """Attention whose keys and values may come from another sequence.

    Args:
        config: Config of the model.
        kind: Config of the layer.
    """

    def __init__(self, config: EncoderDecoderConfig, kind: LayerConfig) -> None:
        super().__init__()
        self.kind = kind
        inner, bias = kind.heads * kind.head_width, kind.qkv_bias
        self.q_proj = nn.Linear(config.hidden, inner, bias=bias)
        self.k_proj = nn.Linear(config.hidden, inner, bias=bias and config.key_bias)
        self.v_proj = nn.Linear(config.hidden, inner, bias=bias)
        self.o_proj = nn.Linear(inner, config.hidden, bias=kind.output_bias)

    def pair(self, x: Tensor) -> Pair:
        """Return the keys and values [B, H, S, D] of ``x`` [B, S, E]."""
        return self._heads(self.k_proj(x)), self._heads(self.v_proj(x))

    def empty(self, x: Tensor) -> Pair:
        """Return empty keys and values for the batch of ``x``."""
        none = x.new_zeros(x.shape[0], self.kind.heads, 0, self.kind.head_width)
        return none, none

    @override
    def forward(self, x: Tensor, pair: Pair, mask: Tensor | None) -> Tensor:
        """Return [B, S, E] for ``x`` [B, S, E]."""
        query = self._heads(self.q_proj(x))
        mixed = functional.scaled_dot_product_attention(
            query, *pair, attn_mask=mask, scale=self.kind.scale
        )
        result: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return result

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.kind.head_width).transpose(1, 2)


def norm(config: EncoderDecoderConfig) -> nn.Module:
    """Return a norm of the model's kind and width."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.hidden, eps=config.norm_epsilon)
