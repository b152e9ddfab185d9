"""Every family computes what transformers' own implementation of the same file computes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from llmopt.models import DecoderConfig, Definition, EncoderConfig, ParameterRecipe, define
from llmopt.models.definition import FAMILIES

B, S, P = 3, 5, 4  # H, G, D, E, F and V are below; no two are equal
REL = 1e-4  # float32, max|a-b| / max|b| over unpadded positions

_DECODER: Mapping[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER: Mapping[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-2,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_FACTORS = [1.0 + 0.5 * i for i in range(4)]
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": _FACTORS,
    "long_factor": [3 * factor for factor in _FACTORS],
}
_GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}


@dataclass(frozen=True)
class Case:
    """A tiny random checkpoint: a transformers config class, and what it is called with."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def named(self) -> str:
        """Return what the test is called."""
        return self.label or self.kind


DECODERS = [
    Case("llama"),
    Case("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}, "llama biases"),
    Case("llama", {"hidden_act": "relu"}, "llama relu"),
    Case("llama", {"tie_word_embeddings": True}, "llama tied"),
    Case("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "llama linear"),
    Case("llama", {"rope_scaling": _LLAMA3, "rope_theta": 500000.0}, "llama llama3"),
    Case("llama", {"rope_scaling": _YARN}, "llama yarn"),
    Case(
        "llama",
        {"rope_scaling": _YARN | {"original_max_position_embeddings": 10**9}},
        "llama yarn ramp past the end",
    ),
    Case(
        "llama",
        {"rope_scaling": _YARN | {"truncate": False, "mscale": 0.7, "mscale_all_dim": 0.4}},
        "llama yarn mscale",
    ),
    Case("mistral", {"sliding_window": 7}),
    Case("mistral", {"sliding_window": None}, "mistral full"),
    Case("qwen2"),
    Case(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        "qwen2 window",
    ),
    Case("qwen3", {"head_dim": 10}),
    Case("smollm3", {"no_rope_layer_interval": 2}),
    Case(
        "smollm3",
        {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 7},
        "smollm3 window",
    ),
    Case(
        "gemma2",
        {
            "head_dim": 10,
            "sliding_window": 7,
            "query_pre_attn_scalar": 11,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    Case(
        "gemma3_text",
        {
            "head_dim": 10,
            "sliding_window": 7,
            "query_pre_attn_scalar": 11,
            "rope_parameters": _GEMMA3_ROPE,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "gemma3_text",
        {
            "head_dim": 10,
            "sliding_window": 7,
            "sliding_window_pattern": 2,
            "rope_theta": 30000.0,
            "rope_local_base_freq": 500.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "gemma3_text first format",
    ),
    Case("phi3", {"partial_rotary_factor": 0.75}),
    Case(
        "phi3",
        {"rope_scaling": _LONGROPE, "original_max_position_embeddings": 8},
        "phi3 longrope",
    ),
    Case("phi3", {"sliding_window": 7, "tie_word_embeddings": True}, "phi3 window"),
    Case(
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 5.0,
        },
    ),
    Case("gpt2", {"n_inner": 60}),
    Case("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "gpt2 by depth"),
]
ENCODERS = [
    Case("bert"),
    Case("bert", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}, "bert tanh"),
    Case("roberta", {"type_vocab_size": 1, "pad_token_id": 1}),
    Case("xlm-roberta", {"type_vocab_size": 1, "pad_token_id": 5}),
    Case("distilbert", {"dim": 48, "hidden_dim": 60, "n_layers": 3, "n_heads": 6}),
    Case("mpnet", {"pad_token_id": 1}),
]


def fields(case: Case, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config as its author writes it, with defaults left out."""
    if case.kind == "gpt2":
        sizes = {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64, "vocab_size": 101}
        base = {**sizes, "layer_norm_epsilon": 1e-2, "bos_token_id": 1, "eos_token_id": 2}
    return {"model_type": case.kind, **base, **case.options}


def reference(case: Case, base: Mapping[str, Any], auto: Any) -> Any:
    """Return transformers' model with every parameter moved away from its initial value."""
    config = transformers.AutoConfig.for_model(**copy.deepcopy(fields(case, base)))
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def load(model: Any, **extra: Any) -> tuple[Definition, Any]:
    """Return our definition of a transformers model, and its module with the weights in."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    written = {**model.config.to_dict(), "architectures": [type(model).__name__], **extra}
    definition = define(written, state)
    module = definition.module(device="cpu")
    made = {
        name: torch.from_numpy(np.ascontiguousarray(recipe.apply(state.__getitem__)))
        for name, recipe in definition.recipes().items()
    }
    module.load_state_dict(made)
    return definition, module


def worst(ours: Tensor, theirs: Tensor, real: Tensor) -> float:
    """Return max|a-b| / max|b| where ``real`` [B, S]; both are [B, S, ...]."""
    assert ours.shape == theirs.shape
    return float((ours - theirs)[real].abs().max() / theirs[real].abs().max())


def padded(length: int, side: str) -> Tensor:
    """Return a mask [B, length] whose rows are padded by 0, 1, 2 tokens on one side."""
    counts = torch.arange(B)[:, None] if side != "none" else torch.zeros(B, 1)
    places = torch.arange(length)[None]
    return (places >= counts if side == "left" else places < length - counts).long()


def tokens(length: int, seed: int = 3) -> Tensor:
    return torch.randint(6, 101, (B, length), generator=torch.Generator().manual_seed(seed))


def empty_past(definition: Definition, length: int = 0) -> list[tuple[Tensor, Tensor]]:
    assert isinstance(definition.config, DecoderConfig)
    layers = definition.config.layers
    shapes = [(B, kind.kv_heads, length, kind.head_width) for kind in layers]
    return [(torch.zeros(shape), torch.zeros(shape)) for shape in shapes]


def run(
    pair: tuple[Any, Definition, Any], ids: Tensor, mask: Tensor, cuts: tuple[int, ...]
) -> float:
    """Return the worst error of logits and caches over steps that end at ``cuts``."""
    model, definition, module = pair
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, past, errors = transformers.DynamicCache(), empty_past(definition), [0.0]
    for start, stop in itertools.pairwise((0, *cuts)):
        step = (ids[:, start:stop], mask[:, :stop], positions[:, start:stop])
        with torch.no_grad():
            theirs = model(
                input_ids=step[0],
                attention_mask=step[1],
                position_ids=step[2],
                past_key_values=cache,
                use_cache=True,
            )
            ours, past = module(*step, past)
        errors.append(worst(ours, theirs.logits, mask[:, start:stop].bool()))
        for present, layer in zip(past, cache.layers, strict=True):
            for mine, other in zip(present, (layer.keys, layer.values), strict=True):
                real = mask[:, :stop].bool()
                errors.append(worst(mine.transpose(1, 2), other.transpose(1, 2), real))
    return max(errors)


@pytest.fixture(params=DECODERS, ids=Case.named, scope="module")
def decoder(request: pytest.FixtureRequest) -> tuple[Any, Definition, Any]:
    model = reference(request.param, _DECODER, transformers.AutoModelForCausalLM)
    return model, *load(model)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_decoder_equals_transformers_at_prefill_and_on_its_cache(
    decoder: tuple[Any, Definition, Any], side: str
) -> None:
    assert run(decoder, tokens(P + S), padded(P + S, side), (P, P + S)) <= REL


def test_a_decoder_equals_transformers_far_past_every_window_and_trained_length(
    decoder: tuple[Any, Definition, Any],
) -> None:
    assert run(decoder, tokens(40), padded(40, "left"), (31, 39, 40)) <= REL


def test_a_decoder_run_in_parts_has_the_hidden_states_of_transformers(
    decoder: tuple[Any, Definition, Any],
) -> None:
    model, definition, module = decoder
    ids, mask = tokens(P + S), padded(P + S, "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    past = empty_past(definition)
    with torch.no_grad():
        theirs = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True
        )
        whole, presents = module(ids, mask, positions, past)
        hidden = [module.embed(ids, positions)]
        context = module.context(mask, positions, past)
        for index, layer in enumerate(module.layers.values()):
            after, present = layer(hidden[-1], context, past[index])
            hidden.append(after)
            torch.testing.assert_close(present, presents[index], rtol=0, atol=0)
        hidden[-1] = module.finish(hidden[-1])
        parts = module.head(hidden[-1])
    for mine, other in zip(hidden, theirs.hidden_states, strict=True):
        assert worst(mine, other, mask.bool()) <= REL
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@pytest.fixture(params=ENCODERS, ids=Case.named, scope="module")
def encoder(request: pytest.FixtureRequest) -> tuple[Any, Definition, Any]:
    model = reference(request.param, _ENCODER, transformers.AutoModel)
    return model, *load(model)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_an_encoder_run_in_parts_has_the_hidden_states_of_transformers(
    encoder: tuple[Any, Definition, Any], side: str
) -> None:
    model, definition, module = encoder
    mask = padded(S, side)
    ids = tokens(S).masked_fill(mask == 0, model.config.pad_token_id)
    ids[0, 2] = model.config.pad_token_id  # in the text, too: RoBERTa counts past it
    typed = isinstance(definition.config, EncoderConfig) and definition.config.token_types > 1
    extra = {"token_type_ids": tokens(S, 5) % 2} if typed else {}
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask, output_hidden_states=True, **extra)
        hidden = [module.embed(ids, *extra.values())]
        context = module.context(mask)
        for layer in module.layers.values():
            hidden.append(layer(hidden[-1], context))
        whole = module(ids, mask, *extra.values())
    for mine, other in zip(hidden, theirs.hidden_states, strict=True):
        assert worst(mine, other, mask.bool()) <= REL
    torch.testing.assert_close(whole["last_hidden_state"], hidden[-1], rtol=0, atol=0)


@pytest.mark.parametrize("case", DECODERS + ENCODERS, ids=Case.named)
def test_a_config_with_defaults_left_out_means_what_transformers_makes_of_it(case: Case) -> None:
    given = fields(case, _ENCODER if case in ENCODERS else _DECODER)
    full = transformers.AutoConfig.for_model(**copy.deepcopy(given)).to_dict()
    parse = FAMILIES[case.kind].parse
    assert parse(given) == parse(full)


def test_only_the_weights_of_gpt2_are_transposed() -> None:
    definition, _ = load(reference(Case("gpt2"), _DECODER, transformers.AutoModelForCausalLM))
    recipes = definition.recipes()
    fused = "transformer.h.1.attn.c_attn"
    assert recipes["layers.1.attention.k_proj.weight"] == ParameterRecipe(
        (f"{fused}.weight",), "transpose", (48, 96)
    )
    assert recipes["layers.1.attention.k_proj.bias"] == ParameterRecipe(
        (f"{fused}.bias",), "copy", (48, 96)
    )


def test_token_types_not_given_are_all_the_first() -> None:
    model = reference(Case("bert"), _ENCODER, transformers.AutoModel)
    _, module = load(model)
    ids, mask = tokens(S), padded(S, "none")
    with torch.no_grad():
        ours = module(ids, mask)["last_hidden_state"]
        assert worst(ours, model(ids, attention_mask=mask)[0], mask.bool()) <= REL


def test_relative_positions_equal_transformers_past_the_furthest_bucket() -> None:
    case = Case("mpnet", {"pad_token_id": 1, "max_position_embeddings": 200})
    model = reference(case, _ENCODER, transformers.AutoModel)
    _, module = load(model)
    ids, mask = tokens(170), padded(170, "none")
    with torch.no_grad():
        ours = module(ids, mask)["last_hidden_state"]
        assert worst(ours, model(ids, attention_mask=mask)[0], mask.bool()) <= REL


@pytest.mark.parametrize("length", ["own length", "length 1"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "mean_sqrt_len"])
def test_pooling_equals_its_formula_sentence_by_sentence(pooling: str, length: str) -> None:
    model = reference(Case("bert"), _ENCODER, transformers.AutoModel)
    _, module = load(model, pooling=pooling, normalize=length == "length 1")
    ids, mask = tokens(S), padded(S, "right")
    with torch.no_grad():
        outputs = module(ids, mask)
    for row, count in enumerate(mask.sum(1).tolist()):
        states = outputs["last_hidden_state"][row, :count].double()
        want = {
            "mean": states.mean(0),
            "cls": states[0],
            "max": states.max(0).values,
            "mean_sqrt_len": states.sum(0) / count**0.5,
        }[pooling]
        want = want / want.norm() if length == "length 1" else want
        got = outputs["sentence_embedding"][row].double()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
