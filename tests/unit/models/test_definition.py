"""A definition finds every tensor of a checkpoint, and refuses what it would get wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from llmopt.errors import UnsupportedModelError
from llmopt.models import DecoderConfig, Definition, EncoderConfig, ParameterRecipe, define
from llmopt.models.buckets import distance_buckets
from llmopt.models.definition import FAMILIES, build
from llmopt.models.encoder import Encoder

LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
BERT: Mapping[str, Any] = {
    "model_type": "bert",
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 16,
    "hidden_act": "gelu",
}
_LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_OTHERS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
_IN_LAYER = (*_LINEAR, *_OTHERS, "post_attention_layernorm")
NAMES = frozenset(
    {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    | {f"model.layers.{i}.{part}.weight" for i in range(4) for part in _IN_LAYER}
)
_BERT_LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
_BERT_TOP = ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight")
BERT_NAMES = frozenset(
    {f"embeddings.{name}" for name in (*_BERT_TOP, "LayerNorm.weight", "LayerNorm.bias")}
    | {
        f"encoder.layer.{i}.{part}.{leaf}"
        for i in range(2)
        for part in _BERT_LAYER
        for leaf in ("weight", "bias")
    }
)


def llama(names: frozenset[str] = NAMES, **changes: Any) -> Definition:
    return define({**LLAMA, **changes}, names)


def decoder(definition: Definition) -> DecoderConfig:
    assert isinstance(definition.config, DecoderConfig)
    return definition.config


def test_every_parameter_has_a_recipe_and_every_tensor_is_used() -> None:
    definition = llama()
    parameters = dict(definition.module().named_parameters())
    assert set(definition.recipes()) == set(parameters)
    assert {source for r in definition.recipes().values() for source in r.sources} == NAMES


def test_names_without_the_prefix_are_found() -> None:
    bare = frozenset(name.removeprefix("model.") for name in NAMES)
    assert llama(bare).recipes()["norm.weight"] == ParameterRecipe(("norm.weight",))
    wrapped = frozenset(f"0.auto_model.{name}" for name in BERT_NAMES)
    source = define(BERT, wrapped).recipes()["embed_norm.bias"]
    assert source == ParameterRecipe(("0.auto_model.embeddings.LayerNorm.bias",))


def test_first_year_names_of_norms_are_found() -> None:
    old = frozenset(
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta")
        for name in BERT_NAMES
    )
    recipes = define(BERT, old).recipes()
    assert recipes["embed_norm.weight"] == ParameterRecipe(("embeddings.LayerNorm.gamma",))
    assert recipes["layers.1.feed_forward_norm.bias"].sources[0].endswith("LayerNorm.beta")


def test_a_tied_head_is_listed_once() -> None:
    definition = llama(NAMES - {"lm_head.weight"}, tie_word_embeddings=True)
    assert "lm_head.weight" not in definition.recipes()
    assert isinstance(definition.config, DecoderConfig)
    assert definition.config.tied


@pytest.mark.parametrize("same", [True, False, None])
def test_a_head_beside_a_tied_embedding_stays_unless_it_is_equal(same: bool | None) -> None:
    asked = []

    def equal(a: str, b: str) -> bool:
        asked.append((a, b))
        return bool(same)

    config = {**LLAMA, "tie_word_embeddings": True}
    definition = define(config, NAMES, equal=None if same is None else equal)
    assert ("lm_head.weight" in definition.recipes()) is not bool(same)
    assert asked == ([] if same is None else [("model.embed_tokens.weight", "lm_head.weight")])


def test_some_layers_alone_keep_their_names_and_run() -> None:
    module: Any = llama().module(layers=[0, 3], device="cpu")
    names = {name.split(".")[1] for name, _ in module.named_parameters() if "layers" in name}
    assert names == {"0", "3"}
    past = [(torch.zeros(1, 2, 0, 4), torch.zeros(1, 2, 0, 4)) for _ in range(2)]
    ids = torch.tensor([[1, 2, 3]])
    logits, presents = module(ids, torch.ones_like(ids), torch.arange(3)[None], past)
    assert logits.shape == (1, 3, 31)
    assert [key.shape for key, _ in presents] == [(1, 2, 3, 4)] * 2


def test_a_module_without_layers_still_embeds_and_ends() -> None:
    module: Any = llama().module(layers=[], device="cpu")
    ids = torch.tensor([[1, 2]])
    context = module.context(torch.ones(1, 5), torch.arange(3, 5)[None], [])
    assert context.masks == {}
    assert module.head(module.finish(module.embed(ids, ids))).shape == (1, 2, 31)


def test_parameters_are_on_meta_and_buffers_are_not() -> None:
    for config in (llama().config, define(BERT, BERT_NAMES).config):
        module = build(config)
        assert {p.device.type for p in module.parameters()} == {"meta"}
        assert not any(p.requires_grad for p in module.parameters())
        assert not module.training
        assert {b.device.type for b in module.buffers()} <= {"cpu"}


def test_equal_layers_are_one_kind() -> None:
    windows = {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 3}
    extra = frozenset(f"model.layers.{i}.self_attn.{n}_norm.weight" for i in range(4) for n in "qk")
    layers = decoder(llama(NAMES | extra, architectures=None, **windows)).layers
    assert layers[0] == layers[1] == layers[2] != layers[3]


def test_rotary_is_left_out_of_every_so_many_layers() -> None:
    found = llama(model_type="smollm3", architectures=None, no_rope_layer_interval=2)
    layers = decoder(found).layers
    assert [getattr(layer, "rope", None) is not None for layer in layers] == [1, 0, 1, 0]


def test_longrope_is_known_by_its_first_name() -> None:
    factors = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
    configs = [
        _parsed({"model_type": "phi3", "rope_scaling": {**name, **factors}})
        for name in ({"type": "su"}, {"rope_type": "yarn"}, {"rope_type": "longrope"})
    ]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].layers[0].rope.kind == "longrope"


def test_expected_counts_come_from_the_config() -> None:
    assert llama().expected() == {"attention": 4, "norm": 9, "rotary": 4, "activation": 4}
    assert define(BERT, BERT_NAMES).expected() == {
        "attention": 2,
        "norm": 5,
        "rotary": 0,
        "activation": 2,
    }


def test_queries_that_are_padding_stay_finite() -> None:
    for softcap in ({}, {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}):
        module: Any = build(_parsed({"head_dim": 4, **softcap}), device="cpu")
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        mask = torch.tensor([[0, 0, 1, 1]])
        past = [(torch.zeros(1, 2, 0, 4), torch.zeros(1, 2, 0, 4)) for _ in range(4)]
        logits, _ = module(torch.tensor([[1, 2, 3, 4]]), mask, torch.arange(4)[None], past)
        assert logits.isfinite().all()


def _parsed(changes: Mapping[str, Any]) -> Any:
    config = {**LLAMA, **changes}
    return FAMILIES[config["model_type"]].parse(config)


def test_pooling_is_none_unless_it_is_given() -> None:
    config = define(BERT, BERT_NAMES).config
    assert isinstance(config, EncoderConfig)
    assert config.pooling is None
    module = build(config, device="cpu")
    ids = torch.tensor([[1, 2]])
    assert set(module(ids, torch.ones_like(ids))) == {"last_hidden_state"}
    assert isinstance(module, Encoder)


def test_positions_counted_past_the_padding_token_shorten_the_longest_text() -> None:
    longest = {
        kind: _parsed({**BERT, "model_type": kind, "max_position_embeddings": 514}).max_length
        for kind in ("bert", "roberta", "mpnet")
    }
    assert longest == {"bert": 514, "roberta": 512, "mpnet": 512}


def test_distance_buckets_are_symmetric_halves_that_widen() -> None:
    table = distance_buckets(32, 128, ahead=True)
    assert table.shape == (257,)
    behind, ahead = table[:128].flip(0), table[129:]
    assert torch.equal(behind + 16, ahead)
    assert behind[:8].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert behind[-1] == 15
    assert (behind.diff() >= 0).all()


_GEMMA3 = {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh"}


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        pytest.param(
            {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
            ["'mamba' (MambaForCausalLM)", "known: bart, ", "install transformers", "file.py:"],
            id="architecture",
        ),
        pytest.param({"model_type": None}, ["lacks 'model_type'"], id="no model type"),
        pytest.param(
            {"architectures": ["LlamaForSequenceClassification"]},
            ["LlamaForSequenceClassification", "silently drop"],
            id="head",
        ),
        pytest.param({"rope_scaling": {"rope_type": "dynamic"}}, ["'dynamic'"], id="rope"),
        pytest.param({"hidden_act": "xielu"}, ["activation 'xielu'"], id="activation"),
        pytest.param({"hidden_size": None}, ["lacks 'hidden_size'"], id="no size"),
        pytest.param({"num_key_value_heads": 4}, ["6 query heads", "4 key heads"], id="groups"),
        pytest.param({"partial_rotary_factor": 0.5}, ["partial rotary embeddings"], id="partial"),
        pytest.param(
            {"num_hidden_layers": 5}, ["lacks 9 tensors: model.layers.4.", "…"], id="lacks"
        ),
        pytest.param(
            {"num_hidden_layers": 3}, ["9 tensors", "unused: model.layers.3."], id="unused"
        ),
        pytest.param(
            {"quantization_config": {"quant_method": "gptq"}}, ["quantized with 'gptq'"], id="gptq"
        ),
        pytest.param(
            {"model_type": "qwen2", "layer_types": ["chunked_attention"] * 4},
            ["layer_types ['chunked_attention']"],
            id="layer types",
        ),
        pytest.param(
            {"model_type": "smollm3", "no_rope_layers": [1, 0]},
            ["no_rope_layers of 2 layers, not 4"],
            id="rope layers",
        ),
        pytest.param(
            _GEMMA3 | {"use_bidirectional_attention": True}, ["causal"], id="bidirectional gemma"
        ),
        pytest.param(
            {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "add_cross_attention": True},
            ["add_cross_attention"],
            id="cross attention",
        ),
    ],
)
def test_refuses_a_decoder(changes: Mapping[str, Any], reasons: list[str]) -> None:
    config = {**LLAMA, **changes}
    if changes.get("model_type") and "architectures" not in changes:
        config["architectures"] = None
    with pytest.raises(UnsupportedModelError) as caught:
        define(config, NAMES)
    for reason in reasons:
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"is_decoder": True}, "is_decoder", id="decoder"),
        pytest.param({"position_embedding_type": "relative_key"}, "relative_key", id="positions"),
        pytest.param({"pooling": "weightedmean"}, "pooling 'weightedmean'", id="pooling"),
        pytest.param({"architectures": ["BertForTokenClassification"]}, "silently drop", id="head"),
        pytest.param({"model_type": "mpnet"}, "lacks", id="other names"),
    ],
)
def test_refuses_an_encoder(changes: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        define({**BERT, **changes}, BERT_NAMES)
    assert reason in str(caught.value)


def test_heads_of_pre_training_and_computed_buffers_are_left_aside() -> None:
    extra = {"cls.predictions.bias", "pooler.dense.weight", "embeddings.position_ids"}
    masked = define({**BERT, "architectures": ["BertForMaskedLM"]}, BERT_NAMES | extra)
    assert masked == define(BERT, BERT_NAMES)
    inverse = frozenset({"model.layers.0.self_attn.rotary_emb.inv_freq"})
    assert llama(NAMES | inverse) == llama()


def test_a_classifier_is_refused_by_its_tensors_where_the_config_names_no_class() -> None:
    with pytest.raises(UnsupportedModelError, match=r"unused: classifier\.weight"):
        define(BERT, BERT_NAMES | {"classifier.weight"})
