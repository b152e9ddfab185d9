"""Configs of Transformers, as data.

Two layers with equal ``LayerConfig`` compute the same function of their weights: they are one
kind of layer, which is traced only once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Pooling = Literal["mean", "cls", "max", "mean_sqrt_len"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, and its scaling past the training length.

    Args:
        width: Number of a head's first channels that rotate; even.
        theta: Base of the geometric series of frequencies.
        kind: Scaling of the frequencies; each field below belongs to some kinds only.
        factor: Ratio of the longest sequence to the training length.
        original_length: Training length.
        low: Wavelengths longer than ``original_length / low`` are scaled in full (llama3).
        high: Wavelengths shorter than ``original_length / high`` are kept (llama3).
        beta_fast: Channels with more rotations than this are kept (yarn).
        beta_slow: Channels with fewer rotations than this are scaled in full (yarn).
        truncate: Whether yarn's range of channels is rounded outwards to integers.
        short: Divisors of each frequency up to the original length (longrope).
        long: Divisors of each frequency past the original length (longrope).
        amplitude: Factor of cos and sin (yarn, longrope).
    """

    width: int
    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_length: float = 0.0
    low: float = 1.0
    high: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    amplitude: float = 1.0


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer: attention, then feed-forward, each around a residual.

    Args:
        heads: Query heads, H.
        kv_heads: Key and value heads, G.
        head_width: Channels of a head, D.
        feed_forward: Width of the feed-forward network, F.
        scale: Factor of scores before the softmax.
        rope: Rotary positions; None for a layer without.
        window: Number of latest keys that a query attends to, its own included; None for all.
        softcap: Scores become ``softcap * tanh(scores / softcap)``; None leaves them.
        qkv_bias: Whether the query, key and value projections add a bias.
        output_bias: Whether the output projection adds a bias.
        feed_forward_bias: Whether the feed-forward projections add a bias.
        qk_norm: Whether each query and key head is normalized before it rotates.
        post_norms: Whether the outputs of both parts are normalized, too.
        gated: Whether the activation multiplies a second projection.
        activation: The activation.
        residual: Factor of each part's output before it is added.
    """

    heads: int
    kv_heads: int
    head_width: int
    feed_forward: int
    scale: float
    rope: Rope | None = None
    window: int | None = None
    softcap: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    feed_forward_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    gated: bool = True
    activation: Activation = "silu"
    residual: float = 1.0


@dataclass(frozen=True)
class DecoderConfig:
    """A causal language model.

    Args:
        vocabulary: Tokens, V.
        hidden: Width of the embedding, E.
        layers: Every layer, first to last.
        max_length: Longest sequence that the checkpoint supports.
        norm: Root-mean-square or layer normalization.
        norm_epsilon: Number added to the variance.
        tied: Whether the head's weight is the embedding's.
        positions: Rows of a learned position embedding; None without one.
        embedding_multiplier: Factor of embeddings.
        logits_divisor: Divisor of logits.
        logits_softcap: Logits become ``cap * tanh(logits / cap)``; None leaves them.
    """

    vocabulary: int
    hidden: int
    layers: tuple[LayerConfig, ...]
    max_length: int
    norm: Literal["rms", "layer"]
    norm_epsilon: float
    tied: bool
    positions: int | None = None
    embedding_multiplier: float = 1.0
    logits_divisor: float = 1.0
    logits_softcap: float | None = None

    def expected(self) -> Mapping[str, int]:
        """Return the number of attentions, norms, rotary embeddings and activations."""
        norms = sum(2 + 2 * each.post_norms + 2 * each.qk_norm for each in self.layers)
        return {
            "attention": len(self.layers),
            "norm": norms + 1,
            "rotary": sum(each.rope is not None for each in self.layers),
            "activation": len(self.layers),
        }


@dataclass(frozen=True)
class EncoderLayerConfig:
    """One encoder layer; norms come after each residual sum.

    Args:
        heads: Attention heads, H.
        head_width: Channels of a head, D.
        feed_forward: Width inside the feed-forward part, F.
        activation: The activation.
    """

    heads: int
    head_width: int
    feed_forward: int
    activation: Activation


@dataclass(frozen=True)
class EncoderConfig:
    """A bidirectional encoder of text.

    Args:
        vocabulary: Tokens, V.
        hidden: Width of the embedding, E.
        layers: Every layer, first to last.
        max_length: Longest sequence that has positions.
        positions: Rows of the learned position embedding.
        norm_epsilon: Number added to the variance.
        padding: Token that has no position of its own, and whose id positions start after
            (RoBERTa); None for positions that are indices (BERT).
        token_types: Rows of the token-type embedding, 0 without one. A model with more than one
            takes ``token_type_ids``.
        relative_buckets: Rows of a bias by distance, shared by the layers (MPNet); 0: none.
        pooling: Pooling of hidden states to one vector; None for no pooling.
        normalize: Whether that vector is scaled to length 1.
    """

    vocabulary: int
    hidden: int
    layers: tuple[EncoderLayerConfig, ...]
    max_length: int
    positions: int
    norm_epsilon: float
    padding: int | None = None
    token_types: int = 0
    relative_buckets: int = 0
    pooling: Pooling | None = None
    normalize: bool = False

    def expected(self) -> Mapping[str, int]:
        """Return the number of attentions, norms, rotary embeddings and activations."""
        layers = len(self.layers)
        return {"attention": layers, "norm": 2 * layers + 1, "rotary": 0, "activation": layers}


@dataclass(frozen=True)
class StackConfig:
    """One of the two stacks of an encoder-decoder.

    Args:
        layers: Every layer, first to last.
        positions: Rows of the position embedding; 0 without one.
        offset: Row of the first position.
        sinusoidal: Whether the position embedding is computed and not in the checkpoint.
        buckets: Rows of a bias by distance, shared by the layers; 0: none.
        furthest: Distance beyond which all share a bucket.
        embed_norm: Whether the input of the first layer is normalized.
        final_norm: Whether the output of the last layer is normalized.
    """

    layers: tuple[LayerConfig, ...]
    positions: int = 0
    offset: int = 0
    sinusoidal: bool = False
    buckets: int = 0
    furthest: int = 128
    embed_norm: bool = False
    final_norm: bool = False

    def norms(self, parts: int) -> int:
        """Return the number of norms, with ``parts`` of them in each layer."""
        return parts * len(self.layers) + self.embed_norm + self.final_norm


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """An encoder-decoder: tokens or audio features in, tokens out.

    Args:
        vocabulary: Tokens of the decoder, V.
        hidden: Width of the embedding, E.
        encoder: Stack of the encoder.
        decoder: Stack of the decoder; its layers have cross-attention, too.
        max_length: Longest sequence of the decoder; 0: any.
        max_source: Longest sequence of the encoder; 0: any.
        norm: Root-mean-square or layer normalization.
        norm_epsilon: Number added to the variance.
        norm_first: Whether each part's input is normalized, not its residual sum.
        key_bias: Whether key projections add a bias where the other projections do.
        tied: Whether the head's weight is the embedding's.
        embedding_multiplier: Factor of embeddings.
        logits_multiplier: Factor of the head's input.
        logits_bias: Whether logits have a bias.
        source_vocabulary: Tokens of the encoder's own embedding; 0: it shares the decoder's.
        bands: Frequency bands of the audio features; 0 for tokens.
    """

    vocabulary: int
    hidden: int
    encoder: StackConfig
    decoder: StackConfig
    max_length: int
    max_source: int
    norm: Literal["rms", "layer"]
    norm_epsilon: float
    norm_first: bool
    key_bias: bool = True
    tied: bool = True
    embedding_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    logits_bias: bool = False
    source_vocabulary: int = 0
    bands: int = 0

    def expected(self) -> Mapping[str, int]:
        """Return the number of attentions, norms, rotary embeddings and activations."""
        encoder, decoder = len(self.encoder.layers), len(self.decoder.layers)
        return {
            "attention": encoder + 2 * decoder,
            "norm": self.encoder.norms(2) + self.decoder.norms(3),
            "rotary": 0,
            "activation": encoder + decoder + (2 if self.bands else 0),
        }
