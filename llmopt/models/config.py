"""What a Transformer is made of, as data.

Two layers with equal ``LayerConfig`` compute the same function of their weights: they are one
kind of layer, which a tracer needs to see only once.
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
    """Rotary positions, and how they are stretched past the length they were trained for.

    Args:
        width: Channels of a head that rotate, from the first on; even.
        theta: The base of the geometric series of frequencies.
        kind: How the frequencies are scaled; the fields below belong to some kinds only.
        factor: How many times longer than trained.
        original_length: The length that was trained for.
        low: Wavelengths longer than ``original_length / low`` are scaled in full (llama3).
        high: Wavelengths shorter than ``original_length / high`` are kept (llama3).
        beta_fast: Channels that turn more often than this are kept (yarn).
        beta_slow: Channels that turn less often than this are scaled in full (yarn).
        truncate: Whether yarn's range of channels is rounded outwards to whole ones.
        short: Divisors of each frequency up to the original length (longrope).
        long: Divisors of each frequency past the original length (longrope).
        amplitude: What cos and sin are multiplied by (yarn, longrope).
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
        feed_forward: Width inside the feed-forward part, F.
        scale: What scores are multiplied by before the softmax.
        rope: Rotary positions, or None for a layer that has none.
        window: How many keys back a query sees, itself included; None for all.
        softcap: Scores become ``softcap * tanh(scores / softcap)``; None leaves them.
        qkv_bias: Whether the query, key and value projections add a bias.
        output_bias: Whether the output projection adds one.
        feed_forward_bias: Whether the feed-forward projections add one.
        qk_norm: Whether each query and key head is normalized before it rotates.
        post_norms: Whether the results of both parts are normalized, too.
        gated: Whether the activation multiplies a second projection.
        activation: The activation.
        residual: What the result of each part is multiplied by before it is added.
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
        max_length: The longest sequence the checkpoint was made for.
        norm: Root-mean-square or layer normalization.
        norm_epsilon: What is added to the variance.
        tied: Whether the head's weight is the embedding's.
        positions: Rows of a learned position embedding; None where there is none.
        embedding_multiplier: What embeddings are multiplied by.
        logits_divisor: What logits are divided by.
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
        """Return how many attentions, norms, rotaries and activations a forward pass has."""
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
        max_length: The longest sequence there are positions for.
        positions: Rows of the learned position embedding.
        norm_epsilon: What is added to the variance.
        padding: The token at which positions stay and after which the others are counted
            (RoBERTa); None counts every index from 0 on (BERT).
        token_types: Rows of the token-type embedding, 0 where there is none. A model with more
            than one takes ``token_type_ids``.
        relative_buckets: Rows of a bias by distance, shared by the layers (MPNet); 0: none.
        pooling: How one vector is made of a sentence; None makes none.
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
        """Return how many attentions, norms, rotaries and activations a forward pass has."""
        layers = len(self.layers)
        return {"attention": layers, "norm": 2 * layers + 1, "rotary": 0, "activation": layers}


@dataclass(frozen=True)
class StackConfig:
    """One of the two stacks of a model that reads one sequence and writes another.

    Args:
        layers: Every layer, first to last.
        positions: Rows of its table of positions; 0 where it has none.
        offset: The row of the first position.
        sinusoidal: Whether that table is computed and not in the checkpoint.
        buckets: Rows of a bias by distance, shared by the layers; 0: none.
        furthest: Distances beyond this share a bucket.
        embed_norm: Whether what enters the first layer is normalized.
        final_norm: Whether what leaves the last one is.
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
        """Return how many norms it has, each layer being of so many parts."""
        return parts * len(self.layers) + self.embed_norm + self.final_norm


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """A model that reads one sequence, of tokens or of sounds, and writes another of tokens.

    Args:
        vocabulary: Tokens that are written, V.
        hidden: Width of the embedding, E.
        encoder: What reads.
        decoder: What writes; its layers attend to what was read, too.
        max_length: The longest sequence that can be written; 0: any.
        max_source: The longest sequence of tokens that can be read; 0: any.
        norm: Root-mean-square or layer normalization.
        norm_epsilon: What is added to the variance.
        norm_first: Whether each part is normalized before it, not after its residual sum.
        key_bias: Whether key projections add a bias where the others do.
        tied: Whether the head's weight is the embedding's.
        embedding_multiplier: What embeddings are multiplied by.
        logits_multiplier: What goes into the head is multiplied by.
        logits_bias: Whether logits have a bias.
        source_vocabulary: Tokens of an embedding that only the encoder has; 0: it shares one.
        bands: Frequency bands of the sounds that are read; 0 where it reads tokens.
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
        """Return how many attentions, norms, rotaries and activations a forward pass has."""
        read, written = len(self.encoder.layers), len(self.decoder.layers)
        return {
            "attention": read + 2 * written,
            "norm": self.encoder.norms(2) + self.decoder.norms(3),
            "rotary": 0,
            "activation": read + written + (2 if self.bands else 0),
        }
