"""A causal language model with a key/value cache, from its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from llmopt.models.activation import activate
from llmopt.models.config import DecoderConfig, LayerConfig, Rope
from llmopt.models.rope import RotaryTable, rotate

Past = tuple[Tensor, Tensor]  # key and value, each [B, G, P, D]


@dataclass(frozen=True)
class Context:
    """Masks and rotary tables that layers share in one forward pass.

    Args:
        masks: Attention mask [B, 1, S, T] bool of each window.
        rotary: Cos and sin [B, S, width] of each rotary setting.
    """

    masks: Mapping[int | None, Tensor]
    rotary: Mapping[Rope, tuple[Tensor, Tensor]]


class Decoder(nn.Module):
    """Embedding, layers, norm and head; ``forward`` only composes the methods above it.

    Args:
        config: Config of the model.
        layers: Indices of the layers to create; parameters keep them in their names.
    """

    def __init__(self, config: DecoderConfig, layers: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        if config.positions is not None:
            self.embed_positions = nn.Embedding(config.positions, config.hidden)
        self.layers = nn.ModuleDict({str(i): DecoderLayer(config, i) for i in layers})
        kinds = [config.layers[i] for i in layers]
        self.windows = list(dict.fromkeys(kind.window for kind in kinds))
        ropes = dict.fromkeys(kind.rope for kind in kinds if kind.rope is not None)
        self.rotary = nn.ModuleList(RotaryTable(rope) for rope in ropes)
        self.norm = _norm(config, config.hidden)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)

    def look_up(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings [B, S, E] of tokens, without positions."""
        embeds: Tensor = self.embed_tokens(input_ids)
        if self.config.embedding_multiplier != 1.0:
            embeds = embeds * self.config.embedding_multiplier
        return embeds

    def begin(self, embeds: Tensor, position_ids: Tensor) -> Tensor:
        """Return the hidden states [B, S, E] that enter the first layer."""
        if self.config.positions is not None:
            embeds = embeds + self.embed_positions(position_ids)
        return embeds

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return the hidden states [B, S, E] of tokens that enter the first layer."""
        return self.begin(self.look_up(input_ids), position_ids)

    def context(
        self, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Past]
    ) -> Context:
        """Return the masks and rotary tables of every kind of layer.

        Args:
            attention_mask: [B, T] int64, 0 where a key is padding.
            position_ids: [B, S] int64.
            past: KV cache of at least one layer, or empty without a cache.
        """
        length = position_ids.shape[1]
        before = past[0][0].shape[2] if past else attention_mask.shape[1] - length
        keys = torch.arange(before + length, device=position_ids.device)
        queries = (torch.arange(length, device=position_ids.device) + before)[:, None]
        real = attention_mask[:, None, None, :] != 0
        masks = {window: _visible(queries, keys, window) & real for window in self.windows}
        tables = [table for table in self.rotary if isinstance(table, RotaryTable)]
        return Context(masks, {table.rope: table(position_ids) for table in tables})

    def finish(self, hidden: Tensor) -> Tensor:
        """Return the hidden states after the final norm."""
        normed: Tensor = self.norm(hidden)
        return normed

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits [B, K, V] of hidden states [B, K, E] after the final norm."""
        weight = self.embed_tokens.weight if self.config.tied else self.lm_head.weight
        logits = functional.linear(hidden, weight)
        if self.config.logits_divisor != 1.0:
            logits = logits / self.config.logits_divisor
        return _capped(logits, self.config.logits_softcap)

    @override
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: list[Past],
    ) -> tuple[Tensor, list[Past]]:
        """Return the logits of every new token, and the cache with them appended.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, P + S] int64, 0 where a key is padding.
            position_ids: [B, S] int64: positions for embeddings and rotary. Causality follows the
                index in the cache.
            past_key_values: Key and value [B, G, P, D] of each layer.
        """
        hidden = self.embed(input_ids, position_ids)
        context = self.context(attention_mask, position_ids, past_key_values)
        presents = []
        for layer, past in zip(self.layers.values(), past_key_values, strict=True):
            hidden, present = layer(hidden, context, past)
            presents.append(present)
        return self.head(self.finish(hidden)), presents


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each with a norm before it and a residual sum after it.

    Args:
        config: Config of the model.
        index: Index of the layer.
    """

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        kind = config.layers[index]
        self.kind = kind
        self.attention_norm = _norm(config, config.hidden)
        self.attention = GroupedQueryAttention(config, kind)
        self.feed_forward_norm = _norm(config, config.hidden)
        self.feed_forward = FeedForward(config.hidden, kind)
        if kind.post_norms:
            self.attention_post_norm = _norm(config, config.hidden)
            self.feed_forward_post_norm = _norm(config, config.hidden)

    @override
    def forward(self, hidden: Tensor, context: Context, past: Past) -> tuple[Tensor, Past]:
        """Return the next hidden states [B, S, E] and this layer's keys and values [B, G, T, D]."""
        change, present = self.attention(self.attention_norm(hidden), context, past)
        if self.kind.post_norms:
            change = self.attention_post_norm(change)
        hidden = hidden + self._damped(change)
        change = self.feed_forward(self.feed_forward_norm(hidden))
        if self.kind.post_norms:
            change = self.feed_forward_post_norm(change)
        return hidden + self._damped(change), present

    def _damped(self, change: Tensor) -> Tensor:
        return change if self.kind.residual == 1.0 else change * self.kind.residual


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention over the cache and the new tokens.

    Args:
        config: Config of the model.
        kind: Config of the layer.
    """

    def __init__(self, config: DecoderConfig, kind: LayerConfig) -> None:
        super().__init__()
        self.kind = kind
        inner, shared = kind.heads * kind.head_width, kind.kv_heads * kind.head_width
        self.q_proj = nn.Linear(config.hidden, inner, bias=kind.qkv_bias)
        self.k_proj = nn.Linear(config.hidden, shared, bias=kind.qkv_bias)
        self.v_proj = nn.Linear(config.hidden, shared, bias=kind.qkv_bias)
        self.o_proj = nn.Linear(inner, config.hidden, bias=kind.output_bias)
        if kind.qk_norm:
            self.q_norm = _norm(config, kind.head_width)
            self.k_norm = _norm(config, kind.head_width)

    @override
    def forward(self, x: Tensor, context: Context, past: Past) -> tuple[Tensor, Past]:
        """Return [B, S, E], and keys and values with the new ones appended."""
        query, key = self._heads(self.q_proj(x)), self._heads(self.k_proj(x))
        if self.kind.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.kind.rope is not None:
            cos, sin = context.rotary[self.kind.rope]
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        key = torch.cat((past[0], key), dim=2)
        value = torch.cat((past[1], self._heads(self.v_proj(x))), dim=2)
        mixed = self._attend(query, key, value, context.masks[self.kind.window])
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), (key, value)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.kind.head_width).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        if self.kind.softcap is None:
            return functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                scale=self.kind.scale,
                enable_gqa=self.kind.heads != self.kind.kv_heads,
            )
        repeats = self.kind.heads // self.kind.kv_heads
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        scores = _capped(query @ key.transpose(2, 3) * self.kind.scale, self.kind.softcap)
        # the lowest number, not -inf: a fully masked query must not become NaN
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1) @ value


class FeedForward(nn.Module):
    """Two projections around an activation, which a third one may gate.

    Args:
        hidden: Width of the embedding.
        kind: Config of the layer.
    """

    def __init__(self, hidden: int, kind: LayerConfig) -> None:
        super().__init__()
        self.kind = kind
        width, bias = kind.feed_forward, kind.feed_forward_bias
        if kind.gated:
            self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return [B, S, E] for ``x`` [B, S, E]."""
        if self.kind.gated:
            inner = activate(self.kind.activation, self.gate_proj(x)) * self.up_proj(x)
        else:
            inner = activate(self.kind.activation, self.up_proj(x))
        result: Tensor = self.down_proj(inner)
        return result


def _norm(config: DecoderConfig, width: int) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(width, eps=config.norm_epsilon)
    return nn.LayerNorm(width, eps=config.norm_epsilon)


def _visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    causal = keys <= queries
    return causal if window is None else causal & (keys > queries - window)


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else torch.tanh(x / cap) * cap
