"""An encoder-decoder, from its config."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from llmopt.models.buckets import distance_buckets
from llmopt.models.config import EncoderDecoderConfig, StackConfig
from llmopt.models.encoder_decoder_layers import (
    AudioConvolutions,
    Bias,
    CachedLayer,
    Layer,
    Pair,
    norm,
)


class EncoderDecoder(nn.Module):
    """Both stacks and the head; ``forward`` only composes the methods of its parts.

    Args:
        config: Config of the model.
        layers: Indices of the layers to create, of each stack that has them; parameters keep
            them in their names.
    """

    def __init__(self, config: EncoderDecoderConfig, layers: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        if config.source_vocabulary:
            self.source_tokens = nn.Embedding(config.source_vocabulary, config.hidden)
        if config.bands:
            self.sounds = AudioConvolutions(config.bands, config.hidden)
        self.encoder = Stack(config, config.encoder, layers, decodes=False)
        self.decoder = Stack(config, config.decoder, layers, decodes=True)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        if config.logits_bias:
            self.logits_bias = Bias(config.vocabulary)

    def embed_source(self, source: Tensor) -> Tensor:
        """Return the hidden states [B, C, E] that enter the encoder.

        Args:
            source: Tokens [B, C] int64; or audio features [B, bands, 2 * C] float.
        """
        if self.config.bands:
            hidden: Tensor = self.sounds(source)
        else:
            table = self.source_tokens if self.config.source_vocabulary else self.embed_tokens
            hidden = self._scaled(table(source))
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        return self.encoder.begin(hidden, positions[None])

    def source_context(self, attention_mask: Tensor) -> Tensor:
        """Return the mask or bias of the encoder's scores.

        Args:
            attention_mask: [B, C] int64, 0 where a token is padding.

        Returns:
            [B, 1, 1, C] bool, true for keys that are not padding; with a bias by distance
            [B, H, C, C] float.
        """
        keys = attention_mask[:, None, None, :] != 0
        if not self.config.encoder.buckets:
            return keys
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        return _masked(self.encoder.bias(positions, positions), keys)

    def cross_pair(self, hidden: Tensor, layer: str) -> Pair:
        """Return the cross-attention keys and values for one layer of the decoder.

        Args:
            hidden: [B, C, E], after the encoder's last norm.
            layer: Name of the layer in the decoder.
        """
        return self._decoder_layer(layer).cross_attention.pair(hidden)

    def decode_layer(
        self, layer: str, hidden: Tensor, mask: Tensor, memory: Tensor, source_mask: Tensor | None
    ) -> Tensor:
        """Return the output [B, S, E] of a layer of the decoder, without a KV cache.

        Args:
            layer: Name of the layer in the decoder.
            hidden: [B, S, E].
            mask: Mask or bias from ``context``.
            memory: Output of the encoder, [B, C, E].
            source_mask: [B, C] int64, 0 where a token is padding; None without padding.
        """
        module = self._decoder_layer(layer)
        seen = None if source_mask is None else source_mask[:, None, None, :] != 0
        past, pair = module.attention.empty(hidden), self.cross_pair(memory, layer)
        output: tuple[Tensor, Pair] = module(hidden, mask, past, pair, seen)
        return output[0]

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return the hidden states [B, S, E] that enter the decoder."""
        return self.decoder.begin(self._scaled(self.embed_tokens(input_ids)), position_ids)

    def context(self, attention_mask: Tensor, length: int) -> Tensor:
        """Return the mask or bias of the decoder's self-attention scores.

        Args:
            attention_mask: [B, T] int64, 0 where a key is padding.
            length: S, the number of new tokens among the T.

        Returns:
            [B, 1, S, T] bool; with a bias by distance [B, H, S, T] float.
        """
        total = attention_mask.shape[1]
        keys = torch.arange(total, device=attention_mask.device)
        queries = torch.arange(length, device=attention_mask.device) + (total - length)
        real = attention_mask[:, None, None, :] != 0
        allowed = (keys <= queries[:, None]) & real
        if not self.config.decoder.buckets:
            return allowed
        return _masked(self.decoder.bias(queries, keys), allowed)

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits [B, K, V] of hidden states [B, K, E] after the decoder's last norm."""
        if self.config.logits_multiplier != 1.0:
            hidden = hidden * self.config.logits_multiplier
        weight = self.embed_tokens.weight if self.config.tied else self.lm_head.weight
        logits = functional.linear(hidden, weight)
        return self.logits_bias(logits) if self.config.logits_bias else logits

    def _decoder_layer(self, layer: str) -> CachedLayer:
        module = self.decoder.layers[layer]
        assert isinstance(module, CachedLayer)
        return module

    def _scaled(self, embedded: Tensor) -> Tensor:
        factor = self.config.embedding_multiplier
        return embedded if factor == 1.0 else embedded * factor

    @override
    def forward(
        self,
        source: Tensor,
        source_mask: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of every token of the decoder, and the encoder's output [B, C, E].

        Args:
            source: Tokens [B, C] int64; or audio features [B, bands, 2 * C] float.
            source_mask: [B, C] int64, 0 where a token is padding; None without padding.
            input_ids: [B, S] int64.
            attention_mask: [B, S] int64, 0 where a token is padding.
            position_ids: [B, S] int64.
        """
        hidden = self.embed_source(source)
        seen = None if source_mask is None else self.source_context(source_mask)
        for layer in self.encoder.layers.values():
            hidden = layer(hidden, seen)
        memory = self.encoder.finish(hidden)
        hidden = self.embed(input_ids, position_ids)
        mask = self.context(attention_mask, input_ids.shape[1])
        for name in self.decoder.layers:
            hidden = self.decode_layer(name, hidden, mask, memory, source_mask)
        return self.head(self.decoder.finish(hidden)), memory


class Stack(nn.Module):
    """The layers of the encoder or decoder, with embeddings and norms around them.

    Args:
        config: Config of the model.
        stack: Config of the stack.
        layers: Indices of the layers to create.
        decodes: Whether it is the decoder's, with cross-attention.
    """

    position_table: Tensor
    buckets: Tensor

    def __init__(
        self,
        config: EncoderDecoderConfig,
        stack: StackConfig,
        layers: Sequence[int],
        *,
        decodes: bool,
    ) -> None:
        super().__init__()
        self.stack = stack
        if stack.sinusoidal:
            table = sinusoids(stack.positions, config.hidden)
            self.register_buffer("position_table", table, persistent=False)
        elif stack.positions:
            self.embed_positions = nn.Embedding(stack.positions, config.hidden)
        if stack.buckets:
            self.relative_bias = nn.Embedding(stack.buckets, stack.layers[0].heads)
            with torch.device("cpu"):
                table = distance_buckets(stack.buckets, stack.furthest, ahead=not decodes)
                self.register_buffer("buckets", table, persistent=False)
        if stack.embed_norm:
            self.embed_norm = norm(config)
        kind = CachedLayer if decodes else Layer
        indices = [i for i in layers if i < len(stack.layers)]
        self.layers = nn.ModuleDict({str(i): kind(config, stack.layers[i]) for i in indices})
        if stack.final_norm:
            self.norm = norm(config)

    def begin(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Return the input [B, S, E] of the first layer; positions [B or 1, S] int64."""
        if self.stack.sinusoidal:
            hidden = hidden + self.position_table[positions]
        elif self.stack.positions:
            hidden = hidden + self.embed_positions(positions + self.stack.offset)
        return self.embed_norm(hidden) if self.stack.embed_norm else hidden

    def finish(self, hidden: Tensor) -> Tensor:
        """Return the output [B, S, E] of the stack."""
        return self.norm(hidden) if self.stack.final_norm else hidden

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the bias [1, H, S, T] of the distances between positions [S] and [T]."""
        furthest = self.stack.furthest
        distances = (keys[None, :] - queries[:, None]).clamp(-furthest, furthest)
        bias: Tensor = self.relative_bias(self.buckets[distances + furthest])
        return bias.permute(2, 0, 1)[None]


def sinusoids(rows: int, width: int) -> Tensor:
    """Return a table of positions [rows, width] float32: sines first, then cosines.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.5.
    """
    half = (width + 1) // 2
    angles = np.arange(rows)[:, None] / np.power(10000.0, 2 * np.arange(half) / width)
    table = np.concatenate([np.sin(angles), np.cos(angles[:, : width - half])], axis=1)
    with torch.device("cpu"):
        return torch.tensor(table, dtype=torch.float32)


def _masked(bias: Tensor, allowed: Tensor) -> Tensor:
    # the lowest number, not -inf: a fully masked query must not become NaN
    return torch.where(allowed, bias, torch.finfo(bias.dtype).min)
