"""The encoders: one row each, by the ``model_type`` of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, get_args

from llmopt.models.config import EncoderConfig, EncoderLayerConfig, Pooling
from llmopt.models.family import Family, Fields, Weight, activation, need
from llmopt.models.rope_config import refused

_CLASSES: Final = ("ForMaskedLM", "ForPreTraining", "Model")  # these share their hidden states

_BERT: Final = {
    "embed_tokens": Weight("embeddings.word_embeddings"),
    "embed_positions": Weight("embeddings.position_embeddings"),
    "embed_types": Weight("embeddings.token_type_embeddings"),
    "embed_norm": Weight("embeddings.LayerNorm"),
    "layers.{}.attention.q_proj": Weight("encoder.layer.{}.attention.self.query"),
    "layers.{}.attention.k_proj": Weight("encoder.layer.{}.attention.self.key"),
    "layers.{}.attention.v_proj": Weight("encoder.layer.{}.attention.self.value"),
    "layers.{}.attention.o_proj": Weight("encoder.layer.{}.attention.output.dense"),
    "layers.{}.attention_norm": Weight("encoder.layer.{}.attention.output.LayerNorm"),
    "layers.{}.feed_forward.up_proj": Weight("encoder.layer.{}.intermediate.dense"),
    "layers.{}.feed_forward.down_proj": Weight("encoder.layer.{}.output.dense"),
    "layers.{}.feed_forward_norm": Weight("encoder.layer.{}.output.LayerNorm"),
}
_MPNET: Final = _BERT | {
    "relative_bias": Weight("encoder.relative_attention_bias"),
    "layers.{}.attention.q_proj": Weight("encoder.layer.{}.attention.attn.q"),
    "layers.{}.attention.k_proj": Weight("encoder.layer.{}.attention.attn.k"),
    "layers.{}.attention.v_proj": Weight("encoder.layer.{}.attention.attn.v"),
    "layers.{}.attention.o_proj": Weight("encoder.layer.{}.attention.attn.o"),
    "layers.{}.attention_norm": Weight("encoder.layer.{}.attention.LayerNorm"),
}
_DISTILBERT: Final = {
    "embed_tokens": Weight("embeddings.word_embeddings"),
    "embed_positions": Weight("embeddings.position_embeddings"),
    "embed_norm": Weight("embeddings.LayerNorm"),
    "layers.{}.attention.q_proj": Weight("transformer.layer.{}.attention.q_lin"),
    "layers.{}.attention.k_proj": Weight("transformer.layer.{}.attention.k_lin"),
    "layers.{}.attention.v_proj": Weight("transformer.layer.{}.attention.v_lin"),
    "layers.{}.attention.o_proj": Weight("transformer.layer.{}.attention.out_lin"),
    "layers.{}.attention_norm": Weight("transformer.layer.{}.sa_layer_norm"),
    "layers.{}.feed_forward.up_proj": Weight("transformer.layer.{}.ffn.lin1"),
    "layers.{}.feed_forward.down_proj": Weight("transformer.layer.{}.ffn.lin2"),
    "layers.{}.feed_forward_norm": Weight("transformer.layer.{}.output_layer_norm"),
}


@dataclass(frozen=True)
class _EncoderTraits:
    """Differences of an encoder from BERT.

    Args:
        keys: Config key for each of BERT's; absent ones are not read.
        padding: Default token whose id positions start after; None if positions are indices.
        padding_fixed: Whether ``padding`` overrides the config's ``pad_token_id``.
        token_types: Default number of rows of the token-type embedding.
        relative_buckets: Default number of rows of the bias by distance.
    """

    keys: Mapping[str, str]
    padding: int | None = None
    padding_fixed: bool = False
    token_types: int = 2
    relative_buckets: int = 0


_BERT_KEYS: Final = {
    key: key
    for key in (
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "intermediate_size",
        "hidden_act",
        "layer_norm_eps",
    )
}
_DISTILBERT_KEYS: Final = {
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
}


def _encoder(config: Fields, traits: _EncoderTraits) -> EncoderConfig:
    _check(config)
    keys = traits.keys
    hidden = int(need(config, keys["hidden_size"]))
    heads = int(need(config, keys["num_attention_heads"]))
    layer = EncoderLayerConfig(
        heads=heads,
        head_width=hidden // heads,
        feed_forward=int(need(config, keys["intermediate_size"])),
        activation=activation(config, keys["hidden_act"], "gelu"),
    )
    positions, padding = int(need(config, "max_position_embeddings")), _padding(config, traits)
    types, buckets = traits.token_types, traits.relative_buckets
    return EncoderConfig(
        vocabulary=int(need(config, "vocab_size")),
        hidden=hidden,
        layers=(layer,) * int(need(config, keys["num_hidden_layers"])),
        max_length=positions if padding is None else positions - padding - 1,
        positions=positions,
        norm_epsilon=float(config.get(keys.get("layer_norm_eps", ""), 1e-12)),
        padding=padding,
        token_types=int(config.get("type_vocab_size", types)) if types else 0,
        relative_buckets=int(
            config.get("relative_attention_num_buckets", buckets) if buckets else 0
        ),
        pooling=_pooling(config),
        normalize=bool(config.get("normalize", False)),
    )


def _check(config: Fields) -> None:
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise refused(config, "is_decoder: the definition is bidirectional")
    kind = config.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise refused(config, f"position_embedding_type {kind!r} (known: absolute)")


def _padding(config: Fields, traits: _EncoderTraits) -> int | None:
    if traits.padding is None or traits.padding_fixed:
        return traits.padding
    configured = config.get("pad_token_id")
    return traits.padding if configured is None else int(configured)


def _pooling(config: Fields) -> Pooling | None:
    name = config.get("pooling")
    for known in get_args(Pooling):
        if name == known:
            result: Pooling = known
            return result
    if name is not None:
        raise refused(config, f"pooling {name!r} (known: {', '.join(get_args(Pooling))})")
    return None


def _row(weights: Mapping[str, Weight], traits: _EncoderTraits) -> Family:
    return Family(partial(_encoder, traits=traits), weights, _CLASSES)


_ROBERTA: Final = _row(_BERT, _EncoderTraits(_BERT_KEYS, padding=1))

ENCODERS: Final[Mapping[str, Family]] = {
    "bert": _row(_BERT, _EncoderTraits(_BERT_KEYS)),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": _row(_DISTILBERT, _EncoderTraits(_DISTILBERT_KEYS, token_types=0)),
    "mpnet": _row(
        _MPNET,
        _EncoderTraits(
            _BERT_KEYS, padding=1, padding_fixed=True, token_types=0, relative_buckets=32
        ),
    ),
}
