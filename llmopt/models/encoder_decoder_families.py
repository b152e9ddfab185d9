"""The encoder-decoders: one row each, by ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from llmopt.models.config import EncoderDecoderConfig, LayerConfig, StackConfig
from llmopt.models.family import Family, Fields, Weight, activation, need
from llmopt.models.rope_config import refused

_SIDES: Final = ("encoder", "decoder")


def _both(table: Mapping[str, str]) -> dict[str, Weight]:
    """Return the rows of both stacks from those of one, with ``{side}`` for the stack."""
    return {
        ours.format(side=side): Weight(theirs.format(side=side))
        for side in _SIDES
        for ours, theirs in table.items()
    }


def _attention(ours: str, theirs: str, output: str = "out_proj") -> dict[str, str]:
    names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": output}
    return {
        f"{{side}}.layers.{{{{}}}}.{ours}.{mine}": f"{{side}}.layers.{{{{}}}}.{theirs}.{name}"
        for mine, name in names.items()
    }


_BART_LAYER: Final = {
    f"{{side}}.layers.{{{{}}}}.{ours}": f"{{side}}.layers.{{{{}}}}.{theirs}"
    for ours, theirs in {
        "attention_norm": "self_attn_layer_norm",
        "cross_attention_norm": "encoder_attn_layer_norm",
        "feed_forward_norm": "final_layer_norm",
        "feed_forward.up_proj": "fc1",
        "feed_forward.down_proj": "fc2",
    }.items()
}
_BART: Final = {
    **_both(
        {
            **_BART_LAYER,
            **_attention("attention", "self_attn"),
            **_attention("cross_attention", "encoder_attn"),
            "{side}.embed_positions": "{side}.embed_positions",
            "{side}.embed_norm": "{side}.layernorm_embedding",
            "{side}.norm": "{side}.layer_norm",
        }
    ),
    "embed_tokens": Weight("shared", instead="decoder.embed_tokens"),
    "source_tokens": Weight("encoder.embed_tokens"),
    "lm_head": Weight("lm_head", rooted=True),
    "logits_bias.bias": Weight("final_logits_bias", rooted=True),
}
_WHISPER: Final = {
    **_BART,
    "embed_tokens": Weight("decoder.embed_tokens"),
    "sounds.conv1": Weight("encoder.conv1"),
    "sounds.conv2": Weight("encoder.conv2"),
    "lm_head": Weight("proj_out", rooted=True),
}
_T5_SELF: Final = {
    f"{{side}}.layers.{{{{}}}}.{ours}": f"{{side}}.block.{{{{}}}}.layer.0.{theirs}"
    for ours, theirs in {
        "attention_norm": "layer_norm",
        "attention.q_proj": "SelfAttention.q",
        "attention.k_proj": "SelfAttention.k",
        "attention.v_proj": "SelfAttention.v",
        "attention.o_proj": "SelfAttention.o",
    }.items()
}
_T5_CROSS: Final = {
    f"decoder.layers.{{}}.{ours}": Weight(f"decoder.block.{{}}.layer.1.{theirs}")
    for ours, theirs in {
        "cross_attention_norm": "layer_norm",
        "cross_attention.q_proj": "EncDecAttention.q",
        "cross_attention.k_proj": "EncDecAttention.k",
        "cross_attention.v_proj": "EncDecAttention.v",
        "cross_attention.o_proj": "EncDecAttention.o",
    }.items()
}


_T5_FORWARD: Final = {
    f"{side}.layers.{{}}.{ours}": Weight(f"{layer}.{theirs}", instead=f"{layer}.{older}")
    for side, layer in (
        ("encoder", "encoder.block.{}.layer.1"),
        ("decoder", "decoder.block.{}.layer.2"),
    )
    for ours, theirs, older in (
        ("feed_forward_norm", "layer_norm", "layer_norm"),
        ("feed_forward.gate_proj", "DenseReluDense.wi_0", "DenseReluDense.wi_0"),
        ("feed_forward.up_proj", "DenseReluDense.wi_1", "DenseReluDense.wi"),
        ("feed_forward.down_proj", "DenseReluDense.wo", "DenseReluDense.wo"),
    )
}
_T5: Final = {
    **_both(
        {
            **_T5_SELF,
            "{side}.relative_bias": "{side}.block.0.layer.0.SelfAttention.relative_attention_bias",
            "{side}.norm": "{side}.final_layer_norm",
        }
    ),
    **_T5_CROSS,
    **_T5_FORWARD,
    "embed_tokens": Weight("shared", instead="decoder.embed_tokens"),
    "lm_head": Weight("lm_head", rooted=True),
}


@dataclass(frozen=True)
class _Seq2SeqTraits:
    """Differences of an encoder-decoder from BART.

    Args:
        norm_first: Whether each part's input is normalized, and each stack's output.
        embed_norm: Whether the input of the first layer is normalized.
        offset: Row of the first position.
        sinusoidal: Whether positions are computed.
        logits_bias: Whether logits have a bias.
        activation: Default activation.
    """

    norm_first: bool = False
    embed_norm: bool = True
    offset: int = 2
    sinusoidal: bool = False
    logits_bias: bool = True
    activation: str = "gelu"


def _bart(config: Fields, traits: _Seq2SeqTraits) -> EncoderDecoderConfig:
    positions = int(config.get("max_position_embeddings") or 1024)
    apart = config.get("share_encoder_decoder_embeddings", True) is False
    vocabulary = int(need(config, "vocab_size"))
    return EncoderDecoderConfig(
        vocabulary=int(config.get("decoder_vocab_size") or vocabulary) if apart else vocabulary,
        hidden=int(need(config, "d_model")),
        encoder=_bart_stack(config, traits, "encoder", positions),
        decoder=_bart_stack(config, traits, "decoder", positions),
        max_length=positions,
        max_source=positions,
        norm="layer",
        norm_epsilon=1e-5,
        norm_first=traits.norm_first,
        tied=bool(config.get("tie_word_embeddings", True)),
        embedding_multiplier=_embedding_scale(config),
        logits_bias=traits.logits_bias,
        source_vocabulary=vocabulary if apart else 0,
    )


def _embedding_scale(config: Fields) -> float:
    return float(need(config, "d_model") ** 0.5) if config.get("scale_embedding") else 1.0


def _bart_stack(config: Fields, traits: _Seq2SeqTraits, side: str, positions: int) -> StackConfig:
    count = int(need(config, f"{side}_layers"))
    return StackConfig(
        layers=(_bart_layer(config, traits, side),) * count,
        positions=positions + traits.offset,
        offset=traits.offset,
        sinusoidal=traits.sinusoidal,
        embed_norm=traits.embed_norm,
        final_norm=traits.norm_first,
    )


def _bart_layer(config: Fields, traits: _Seq2SeqTraits, side: str) -> LayerConfig:
    hidden, heads = int(need(config, "d_model")), int(need(config, f"{side}_attention_heads"))
    if hidden % heads:
        raise refused(config, f"hidden size {hidden} is not a multiple of {heads} heads")
    width = hidden // heads
    return LayerConfig(
        heads=heads,
        kv_heads=heads,
        head_width=width,
        feed_forward=int(need(config, f"{side}_ffn_dim")),
        scale=width**-0.5,
        qkv_bias=True,
        output_bias=True,
        feed_forward_bias=True,
        gated=False,
        activation=activation(config, "activation_function", traits.activation),
    )


def _whisper(config: Fields) -> EncoderDecoderConfig:
    traits = _Seq2SeqTraits(norm_first=True, embed_norm=False, offset=0, logits_bias=False)
    source = int(config.get("max_source_positions") or 1500)
    target = int(config.get("max_target_positions") or 448)
    return EncoderDecoderConfig(
        vocabulary=int(need(config, "vocab_size")),
        hidden=int(need(config, "d_model")),
        encoder=_bart_stack(config, traits, "encoder", source),
        decoder=_bart_stack(config, traits, "decoder", target),
        max_length=target,
        max_source=source,
        norm="layer",
        norm_epsilon=1e-5,
        norm_first=True,
        key_bias=False,
        tied=bool(config.get("tie_word_embeddings", True)),
        embedding_multiplier=_embedding_scale(config),
        bands=int(config.get("num_mel_bins") or 80),
    )


def _t5(config: Fields) -> EncoderDecoderConfig:
    hidden, depth = int(need(config, "d_model")), int(need(config, "num_layers"))
    layer = _t5_layer(config)
    buckets = int(config.get("relative_attention_num_buckets") or 32)
    furthest = int(config.get("relative_attention_max_distance") or 128)

    def stack(layers: int) -> StackConfig:
        return StackConfig((layer,) * layers, buckets=buckets, furthest=furthest, final_norm=True)

    # newer configs have a key of their own; in older ones it follows from the tied head
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
    return EncoderDecoderConfig(
        vocabulary=int(need(config, "vocab_size")),
        hidden=hidden,
        encoder=stack(depth),
        decoder=stack(int(config.get("num_decoder_layers") or depth)),
        max_length=0,
        max_source=0,
        norm="rms",
        norm_epsilon=float(config.get("layer_norm_epsilon", 1e-6)),
        norm_first=True,
        tied=True,
        logits_multiplier=hidden**-0.5 if scaled else 1.0,
    )


def _t5_layer(config: Fields) -> LayerConfig:
    heads = int(need(config, "num_heads"))
    named = str(config.get("feed_forward_proj") or "relu")
    # "gated-gelu" is the name of a checkpoint's training recipe: its GELU is the tanh form
    kind = "gelu_new" if named == "gated-gelu" else named.removeprefix("gated-")
    return LayerConfig(
        heads=heads,
        kv_heads=heads,
        head_width=int(need(config, "d_kv")),
        feed_forward=int(need(config, "d_ff")),
        scale=1.0,
        gated=named.startswith("gated-"),
        activation=activation({**config, "feed_forward_proj": kind}, "feed_forward_proj", kind),
    )


def _row(traits: _Seq2SeqTraits) -> Family:
    return Family(partial(_bart, traits=traits), _BART, _CLASSES)


_CLASSES: Final = ("ForConditionalGeneration", "MTModel")

ENCODER_DECODERS: Final[Mapping[str, Family]] = {
    "bart": _row(_Seq2SeqTraits()),
    "marian": _row(_Seq2SeqTraits(embed_norm=False, offset=0, sinusoidal=True, activation="swish")),
    "mbart": _row(_Seq2SeqTraits(norm_first=True)),
    "mt5": Family(_t5, _T5, _CLASSES),
    "pegasus": _row(
        _Seq2SeqTraits(
            norm_first=True, embed_norm=False, offset=0, sinusoidal=True, activation="relu"
        )
    ),
    "t5": Family(_t5, _T5, _CLASSES),
    "whisper": Family(_whisper, _WHISPER, _CLASSES),
}
