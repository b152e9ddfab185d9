"""The decoders: one row each, by the ``model_type`` of its config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NamedTuple

from llmopt.models.config import DecoderConfig, LayerConfig, Rope
from llmopt.models.family import Family, Fields, Weight, activation, need
from llmopt.models.layer_patterns import (
    config_windows,
    gemma2_windows,
    gemma3_ropes,
    gemma3_windows,
    mistral_windows,
    no_windows,
    one_rope,
    phi3_ropes,
    qwen_windows,
    smollm3_ropes,
    smollm3_windows,
)
from llmopt.models.rope_config import refused

_LLAMA: Final = {
    "embed_tokens": Weight("embed_tokens"),
    "layers.{}.attention_norm": Weight("layers.{}.input_layernorm"),
    "layers.{}.attention.q_proj": Weight("layers.{}.self_attn.q_proj"),
    "layers.{}.attention.k_proj": Weight("layers.{}.self_attn.k_proj"),
    "layers.{}.attention.v_proj": Weight("layers.{}.self_attn.v_proj"),
    "layers.{}.attention.o_proj": Weight("layers.{}.self_attn.o_proj"),
    "layers.{}.attention.q_norm": Weight("layers.{}.self_attn.q_norm"),
    "layers.{}.attention.k_norm": Weight("layers.{}.self_attn.k_norm"),
    "layers.{}.feed_forward_norm": Weight("layers.{}.post_attention_layernorm"),
    "layers.{}.feed_forward.gate_proj": Weight("layers.{}.mlp.gate_proj"),
    "layers.{}.feed_forward.up_proj": Weight("layers.{}.mlp.up_proj"),
    "layers.{}.feed_forward.down_proj": Weight("layers.{}.mlp.down_proj"),
    "norm": Weight("norm"),
    "lm_head": Weight("lm_head", rooted=True),
}
_PHI3: Final = _LLAMA | {
    "layers.{}.attention.q_proj": Weight("layers.{}.self_attn.qkv_proj", part="q"),
    "layers.{}.attention.k_proj": Weight("layers.{}.self_attn.qkv_proj", part="k"),
    "layers.{}.attention.v_proj": Weight("layers.{}.self_attn.qkv_proj", part="v"),
    "layers.{}.feed_forward.gate_proj": Weight("layers.{}.mlp.gate_up_proj", part="gate"),
    "layers.{}.feed_forward.up_proj": Weight("layers.{}.mlp.gate_up_proj", part="up"),
}
_GEMMA: Final = _LLAMA | {  # its norms multiply by 1 + weight
    "layers.{}.attention_norm": Weight("layers.{}.input_layernorm", "add-one"),
    "layers.{}.attention.q_norm": Weight("layers.{}.self_attn.q_norm", "add-one"),
    "layers.{}.attention.k_norm": Weight("layers.{}.self_attn.k_norm", "add-one"),
    "layers.{}.attention_post_norm": Weight("layers.{}.post_attention_layernorm", "add-one"),
    "layers.{}.feed_forward_norm": Weight("layers.{}.pre_feedforward_layernorm", "add-one"),
    "layers.{}.feed_forward_post_norm": Weight("layers.{}.post_feedforward_layernorm", "add-one"),
    "norm": Weight("norm", "add-one"),
}
_GPT2: Final = {  # its projections are stored [in, out]
    "embed_tokens": Weight("wte"),
    "embed_positions": Weight("wpe"),
    "layers.{}.attention_norm": Weight("h.{}.ln_1"),
    "layers.{}.attention.q_proj": Weight("h.{}.attn.c_attn", "transpose", "q"),
    "layers.{}.attention.k_proj": Weight("h.{}.attn.c_attn", "transpose", "k"),
    "layers.{}.attention.v_proj": Weight("h.{}.attn.c_attn", "transpose", "v"),
    "layers.{}.attention.o_proj": Weight("h.{}.attn.c_proj", "transpose"),
    "layers.{}.feed_forward_norm": Weight("h.{}.ln_2"),
    "layers.{}.feed_forward.up_proj": Weight("h.{}.mlp.c_fc", "transpose"),
    "layers.{}.feed_forward.down_proj": Weight("h.{}.mlp.c_proj", "transpose"),
    "norm": Weight("ln_f"),
    "lm_head": Weight("lm_head", rooted=True),
}


def _head_scale(config: Fields, width: int) -> float:
    del config
    return float(width**-0.5)


def _query_scale(config: Fields, width: int) -> float:
    del width
    return float(config.get("query_pre_attn_scalar", 256) ** -0.5)


def _granite_scale(config: Fields, width: int) -> float:
    del width
    return float(config.get("attention_multiplier", 1.0))


class _Multipliers(NamedTuple):
    embedding: float = 1.0
    residual: float = 1.0
    logits_divisor: float = 1.0


def _gemma_multipliers(config: Fields) -> _Multipliers:
    return _Multipliers(embedding=float(need(config, "hidden_size") ** 0.5))


def _granite_multipliers(config: Fields) -> _Multipliers:
    keys = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    return _Multipliers(*(float(config.get(key, 1.0)) for key in keys))


@dataclass(frozen=True)
class _DecoderTraits:
    """Differences of a decoder with rotary positions and RMS norms from Llama.

    Args:
        head_width: Default head width; None: the hidden size over the heads.
        theta: Default base of rotary frequencies.
        epsilon: Default epsilon of norms.
        tied: Default of ``tie_word_embeddings``.
        biases: Whether the config's ``attention_bias`` and ``mlp_bias`` apply.
        qkv_bias: Whether queries, keys and values always have a bias.
        qk_norm: Whether query and key heads are normalized.
        post_norms: Whether the outputs of both parts are normalized.
        activation: Config key of the activation, and its default.
        softcaps: Caps of scores and of logits, by config key and default.
        multipliers: Multipliers from the config.
        windows: Window of each layer, from the config.
        ropes: Rotary setting of each layer, from config, head width and default theta.
        scale: Factor of scores, from config and head width.
    """

    head_width: int | None = None
    theta: float = 10000.0
    epsilon: float = 1e-6
    tied: bool = False
    biases: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    activation: tuple[str, str] = ("hidden_act", "silu")
    softcaps: tuple[tuple[str, float | None], tuple[str, float | None]] = (("", None), ("", None))
    multipliers: Callable[[Fields], _Multipliers] = lambda _: _Multipliers()
    windows: Callable[[Fields], Sequence[int | None]] = no_windows
    ropes: Callable[[Fields, int, float], Sequence[Rope | None]] = one_rope
    scale: Callable[[Fields, int], float] = _head_scale


def _decoder(config: Fields, traits: _DecoderTraits) -> DecoderConfig:
    if config.get("use_bidirectional_attention"):
        raise refused(config, "use_bidirectional_attention: the definition is causal")
    multipliers = traits.multipliers(config)
    return DecoderConfig(
        vocabulary=int(need(config, "vocab_size")),
        hidden=int(need(config, "hidden_size")),
        layers=_layers(config, traits),
        max_length=int(need(config, "max_position_embeddings")),
        norm="rms",
        norm_epsilon=float(config.get("rms_norm_eps", traits.epsilon)),
        tied=bool(config.get("tie_word_embeddings", traits.tied)),
        embedding_multiplier=multipliers.embedding,
        logits_divisor=multipliers.logits_divisor,
        logits_softcap=config.get(*traits.softcaps[1]),
    )


def _layers(config: Fields, traits: _DecoderTraits) -> tuple[LayerConfig, ...]:
    heads = int(need(config, "num_attention_heads"))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise refused(config, f"{heads} query heads are not a multiple of {kv_heads} key heads")
    narrow = traits.head_width or int(need(config, "hidden_size")) // heads
    width = int(config.get("head_dim") or narrow)
    bias = traits.biases and bool(config.get("attention_bias", False))
    like = LayerConfig(
        heads=heads,
        kv_heads=kv_heads,
        head_width=width,
        feed_forward=int(need(config, "intermediate_size")),
        scale=traits.scale(config, width),
        softcap=config.get(*traits.softcaps[0]),
        qkv_bias=traits.qkv_bias or bias,
        output_bias=bias,
        feed_forward_bias=traits.biases and bool(config.get("mlp_bias", False)),
        qk_norm=traits.qk_norm,
        post_norms=traits.post_norms,
        activation=activation(config, *traits.activation),
        residual=traits.multipliers(config).residual,
    )
    ropes, windows = traits.ropes(config, width, traits.theta), traits.windows(config)
    settings = zip(ropes, windows, strict=True)
    return tuple(replace(like, rope=rope, window=window) for rope, window in settings)


def _gpt2(config: Fields) -> DecoderConfig:
    hidden, heads = int(need(config, "n_embd")), int(need(config, "n_head"))
    if config.get("add_cross_attention"):
        raise refused(config, "add_cross_attention: the definition has no cross-attention")
    width = hidden // heads
    like = LayerConfig(
        heads=heads,
        kv_heads=heads,
        head_width=width,
        feed_forward=int(config.get("n_inner") or 4 * hidden),
        scale=width**-0.5 if config.get("scale_attn_weights", True) else 1.0,
        qkv_bias=True,
        output_bias=True,
        feed_forward_bias=True,
        gated=False,
        activation=activation(config, "activation_function", "gelu_new"),
    )
    by_depth = bool(config.get("scale_attn_by_inverse_layer_idx", False))
    depths = range(1, int(need(config, "n_layer")) + 1)
    positions = int(config.get("n_positions") or 1024)
    return DecoderConfig(
        vocabulary=int(need(config, "vocab_size")),
        hidden=hidden,
        layers=tuple(replace(like, scale=like.scale / (d if by_depth else 1)) for d in depths),
        max_length=positions,
        norm="layer",
        norm_epsilon=float(config.get("layer_norm_epsilon", 1e-5)),
        tied=bool(config.get("tie_word_embeddings", True)),
        positions=positions,
    )


def _row(weights: Mapping[str, Weight], traits: _DecoderTraits) -> Family:
    return Family(partial(_decoder, traits=traits), weights, ("ForCausalLM", "Model"))


_GEMMA_TRAITS: Final = _DecoderTraits(
    head_width=256,
    tied=True,
    post_norms=True,
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    multipliers=_gemma_multipliers,
    scale=_query_scale,
)

DECODERS: Final[Mapping[str, Family]] = {
    "llama": _row(_LLAMA, _DecoderTraits()),
    "mistral": _row(_LLAMA, _DecoderTraits(biases=False, windows=mistral_windows)),
    "qwen2": _row(_LLAMA, _DecoderTraits(biases=False, qkv_bias=True, windows=qwen_windows)),
    "qwen3": _row(_LLAMA, _DecoderTraits(head_width=128, qk_norm=True, windows=qwen_windows)),
    "smollm3": _row(
        _LLAMA, _DecoderTraits(theta=2e6, tied=True, windows=smollm3_windows, ropes=smollm3_ropes)
    ),
    "gemma2": _row(
        _GEMMA,
        replace(
            _GEMMA_TRAITS,
            softcaps=(("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)),
            windows=gemma2_windows,
        ),
    ),
    "gemma3_text": _row(
        _GEMMA,
        replace(
            _GEMMA_TRAITS,
            theta=1e6,
            qk_norm=True,
            softcaps=(("", None), ("final_logit_softcapping", None)),
            windows=gemma3_windows,
            ropes=gemma3_ropes,
        ),
    ),
    "phi3": _row(
        _PHI3, _DecoderTraits(epsilon=1e-5, biases=False, windows=config_windows, ropes=phi3_ropes)
    ),
    "granite": _row(_LLAMA, _DecoderTraits(multipliers=_granite_multipliers, scale=_granite_scale)),
    "gpt2": Family(_gpt2, _GPT2, ("LMHeadModel", "Model")),
}
