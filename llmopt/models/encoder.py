"""A bidirectional encoder of text with sentence pooling, from its config."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from llmopt.models.activation import activate
from llmopt.models.buckets import distance_buckets
from llmopt.models.config import EncoderConfig, EncoderLayerConfig

_BUCKETS = 32  # MPNet's code fixes both, whatever the config has
_FURTHEST = 128


class Encoder(nn.Module):
    """Embeddings, layers and pooling; ``forward`` only composes the methods above it.

    Args:
        config: Config of the model.
        layers: Indices of the layers to create; parameters keep them in their names.
    """

    buckets: Tensor

    def __init__(self, config: EncoderConfig, layers: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.embed_positions = nn.Embedding(config.positions, config.hidden)
        if config.token_types:
            self.embed_types = nn.Embedding(config.token_types, config.hidden)
        self.embed_norm = nn.LayerNorm(config.hidden, eps=config.norm_epsilon)
        if config.relative_buckets:
            heads = config.layers[0].heads
            self.relative_bias = nn.Embedding(config.relative_buckets, heads)
            with torch.device("cpu"):
                table = distance_buckets(_BUCKETS, _FURTHEST, ahead=True)
                self.register_buffer("buckets", table, persistent=False)
        self.layers = nn.ModuleDict({str(i): EncoderLayer(config, i) for i in layers})

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Return the hidden states [B, S, E] that enter the first layer."""
        hidden: Tensor = self.embed_tokens(input_ids)
        if self.config.token_types:
            known = token_type_ids is not None
            hidden = hidden + (self.embed_types(token_type_ids) if known else self._first_type())
        hidden = hidden + self.embed_positions(self._positions(input_ids))
        normed: Tensor = self.embed_norm(hidden)
        return normed

    def _first_type(self) -> Tensor:
        weight: Tensor = self.embed_types.weight
        return weight[0]

    def _positions(self, input_ids: Tensor) -> Tensor:
        if self.config.padding is None:
            return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        real = (input_ids != self.config.padding).long()
        return real.cumsum(dim=1) * real + self.config.padding

    def context(self, attention_mask: Tensor) -> Tensor:
        """Return the mask or bias of the layers' scores.

        [B, 1, 1, S] bool, true for keys that are not padding; with relative positions,
        [B, H, S, S] float: the bias, and the lowest number where a key is padding.
        """
        seen = attention_mask[:, None, None, :] != 0
        if not self.config.relative_buckets:
            return seen
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        distances = (positions[None, :] - positions[:, None]).clamp(-_FURTHEST, _FURTHEST)
        bias: Tensor = self.relative_bias(self.buckets[distances + _FURTHEST])
        bias = bias.permute(2, 0, 1)[None]
        return bias.masked_fill(~seen, torch.finfo(bias.dtype).min)

    def finish(self, hidden: Tensor) -> Tensor:
        """Return the hidden states [B, S, E] after the last layer, unchanged."""
        return hidden

    def pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Return one vector [B, E] for each sentence."""
        assert self.config.pooling is not None
        pooled = _POOLINGS[self.config.pooling](hidden, attention_mask)
        return functional.normalize(pooled, dim=1) if self.config.normalize else pooled

    @override
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return ``last_hidden_state`` and, where the config pools, ``sentence_embedding``.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, S] int64, 0 where a token is padding.
            token_type_ids: [B, S] int64; all 0 by default.
        """
        hidden = self.embed(input_ids, token_type_ids)
        context = self.context(attention_mask)
        for layer in self.layers.values():
            hidden = layer(hidden, context)
        outputs = {"last_hidden_state": self.finish(hidden)}
        if self.config.pooling is not None:
            outputs["sentence_embedding"] = self.pool(hidden, attention_mask)
        return outputs


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each added, then normalized.

    Args:
        config: Config of the model.
        index: Index of the layer.
    """

    def __init__(self, config: EncoderConfig, index: int) -> None:
        super().__init__()
        self.kind = config.layers[index]
        self.attention = EncoderAttention(config.hidden, self.kind)
        self.attention_norm = nn.LayerNorm(config.hidden, eps=config.norm_epsilon)
        self.feed_forward = EncoderFeedForward(config.hidden, self.kind)
        self.feed_forward_norm = nn.LayerNorm(config.hidden, eps=config.norm_epsilon)

    @override
    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Return the next hidden states [B, S, E]."""
        hidden = self.attention_norm(hidden + self.attention(hidden, context))
        result: Tensor = self.feed_forward_norm(hidden + self.feed_forward(hidden))
        return result


class EncoderAttention(nn.Module):
    """Attention of every token to every token that is not padding.

    Args:
        hidden: Width of the embedding.
        kind: Config of the layer.
    """

    def __init__(self, hidden: int, kind: EncoderLayerConfig) -> None:
        super().__init__()
        self.kind = kind
        inner = kind.heads * kind.head_width
        self.q_proj = nn.Linear(hidden, inner)
        self.k_proj = nn.Linear(hidden, inner)
        self.v_proj = nn.Linear(hidden, inner)
        self.o_proj = nn.Linear(inner, hidden)

    @override
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return [B, S, E] for ``x`` [B, S, E]."""
        query, key, value = (
            projection(x).unflatten(-1, (self.kind.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        result: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return result


class EncoderFeedForward(nn.Module):
    """Two projections around an activation.

    Args:
        hidden: Width of the embedding.
        kind: Config of the layer.
    """

    def __init__(self, hidden: int, kind: EncoderLayerConfig) -> None:
        super().__init__()
        self.kind = kind
        self.up_proj = nn.Linear(hidden, kind.feed_forward)
        self.down_proj = nn.Linear(kind.feed_forward, hidden)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return [B, S, E] for ``x`` [B, S, E]."""
        result: Tensor = self.down_proj(activate(self.kind.activation, self.up_proj(x)))
        return result


def _sum(hidden: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over unpadded tokens [B, E], and their number [B, 1]."""
    weight = attention_mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(dim=1), weight.sum(dim=1).clamp(min=1e-9)


def _mean(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    total, count = _sum(hidden, attention_mask)
    return total / count


def _mean_sqrt_len(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    total, count = _sum(hidden, attention_mask)
    return total / count.sqrt()


def _cls(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    del attention_mask  # the first token, padding or not, as in sentence-transformers
    return hidden[:, 0]


def _max(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    return hidden.masked_fill(attention_mask[..., None] == 0, -1e9).amax(dim=1)


_POOLINGS = {"mean": _mean, "cls": _cls, "max": _max, "mean_sqrt_len": _mean_sqrt_len}
