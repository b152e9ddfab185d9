"""A model written as GGUF and read back computes what it did: config, names and layouts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.gguf_files import (
    FEED,
    GROUPS,
    HEAD_WIDTH,
    HEADS,
    HIDDEN,
    LAYERS,
    VOCABULARY,
    converted,
    permute,
    sizes,
    write,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from llmopt.frontend.gguf.checkpoint import GgufCheckpoint
from llmopt.frontend.gguf.config import gguf_config

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FEED,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD_WIDTH,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = [1.0 + 0.25 * i for i in range(HEAD_WIDTH // 4)]
SHORT = [1.0 + 0.125 * i for i in range(HEAD_WIDTH // 4)]


@dataclass(frozen=True)
class Case:
    """One model: as transformers configures it, and as a GGUF file does."""

    model_type: str
    architecture: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    loader: bool = True  # whether transformers' own GGUF loader knows all of it


def llama3_table() -> np.ndarray:
    """Return the divisors that llama.cpp's converter writes, by transformers' own arithmetic."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.for_model("llama", **DECODER | {"rope_scaling": LLAMA3})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 50000.0 ** -(torch.arange(0, HEAD_WIDTH, 2, dtype=torch.float64) / HEAD_WIDTH)
    return np.asarray((plain / scaled).float().numpy())


CASES = {
    "llama": Case("llama", "llama"),
    "llama-tied": Case("llama", "llama", {"tie_word_embeddings": True}),
    "llama-bias": Case("llama", "llama", {"attention_bias": True, "mlp_bias": True}, loader=False),
    "llama-3.1": Case(
        "llama",
        "llama",
        {"rope_scaling": LLAMA3},
        extra={"rope_freqs.weight": llama3_table()},
        loader=False,
    ),
    "llama-linear": Case(
        "llama",
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        loader=False,
    ),
    "llama-yarn": Case(
        "llama",
        "llama",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
        },
        loader=False,
    ),
    "mistral": Case(
        "mistral", "llama", {"sliding_window": 5}, {"attention.sliding_window": 5}, loader=False
    ),
    "qwen2": Case("qwen2", "qwen2", {"head_dim": HIDDEN // HEADS}),
    "qwen3": Case("qwen3", "qwen3", loader=False),  # it leaves head_dim at its class's default
    "smollm3": Case("smollm3", "smollm3", {"num_hidden_layers": LAYERS}, loader=False),
    "granite": Case(
        "granite",
        "granite",
        {
            "attention_multiplier": 0.125,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 4.0,
            "head_dim": HIDDEN // HEADS,
        },
        {
            "attention.scale": 0.125,
            "embedding_scale": 3.0,
            "residual_scale": 0.5,
            "logit_scale": 4.0,
        },
        loader=False,
    ),
    "phi3": Case(
        "phi3",
        "phi3",
        {"head_dim": HIDDEN // HEADS, "sliding_window": 6},
        {"attention.sliding_window": 6, "rope.dimension_count": HIDDEN // HEADS},
        loader=False,
    ),
    "phi3-longrope": Case(
        "phi3",
        "phi3",
        {
            "hidden_size": HEADS * HEAD_WIDTH,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 8,
            "rope_scaling": {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT},
        },
        {
            "embedding_length": HEADS * HEAD_WIDTH,
            "rope.dimension_count": HEAD_WIDTH // 2,
            "rope.scaling.original_context_length": 8,
        },
        {
            "rope_factors_long.weight": np.array(LONG, np.float32),
            "rope_factors_short.weight": np.array(SHORT, np.float32),
        },
        loader=False,
    ),
    "gemma2": Case(
        "gemma2",
        "gemma2",
        {
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "query_pre_attn_scalar": HEAD_WIDTH,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
        {
            "attention.sliding_window": 5,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
        loader=False,
    ),
    "gemma3": Case(
        "gemma3_text",
        "gemma3",
        {
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "query_pre_attn_scalar": HEAD_WIDTH,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_local_base_freq": 10000.0,
        },
        {
            "attention.sliding_window": 5,
            "attention.sliding_window_pattern": 2,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        loader=False,
    ),
}


def random_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Move every weight off its initial value and return them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    tied = {"lm_head.weight"} if getattr(model.config, "tie_word_embeddings", False) else set()
    state = model.state_dict()
    return {name: value.numpy() for name, value in state.items() if name not in tied}


def convert(case: Case, name: str, array: np.ndarray) -> np.ndarray:
    """Do to a tensor what llama.cpp's converter for the architecture does."""
    if case.architecture in {"llama", "granite", "smollm3"} and ".attn_q." in name:
        return permute(array, HEADS)
    if case.architecture in {"llama", "granite", "smollm3"} and ".attn_k." in name:
        return permute(array, GROUPS)
    if case.architecture.startswith("gemma") and name.endswith("norm.weight"):
        return array + 1.0
    return array


def written(case: Case, path: Path) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    config = AutoConfig.for_model(case.model_type, **DECODER | dict(case.config))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = random_state(model)
    tensors = converted(state, case.architecture, lambda name, array: convert(case, name, array))
    width = config.head_dim if hasattr(config, "head_dim") else HEAD_WIDTH
    metadata = sizes(**{"attention.key_length": width, "attention.value_length": width})
    metadata["rope.dimension_count"] = width
    write(path, case.architecture, {**metadata, **IDS, **case.metadata}, {**tensors, **case.extra})
    return model, state


@pytest.mark.parametrize("name", CASES)
def test_a_decoder_reads_back_as_it_was(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model, state = written(case, tmp_path / "model.gguf")
    checkpoint = GgufCheckpoint(tmp_path / "model.gguf")
    assert set(checkpoint.names()) == set(state)
    read = {each: checkpoint.read(each) for each in checkpoint.names()}
    for each, expected in state.items():
        assert checkpoint.shape(each) == expected.shape
        np.testing.assert_allclose(read[each], expected, rtol=0, atol=3e-7)

    config = gguf_config(checkpoint.file)
    again = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), dtype=torch.float32
    ).eval()
    again.load_state_dict({k: torch.from_numpy(v) for k, v in read.items()}, strict=False)
    again.tie_weights()
    tokens = torch.randint(0, VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected_logits, logits = model(tokens).logits, again(tokens).logits
    error = (logits - expected_logits).abs().max() / expected_logits.abs().max()
    assert float(error) < 1e-5


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.loader])
def test_transformers_loads_the_same_weights_from_the_file(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, _ = written(CASES[name], tmp_path / "model.gguf")
    theirs = load_gguf_checkpoint(
        tmp_path / "model.gguf", return_tensors=True, model_to_load=model
    )["tensors"]
    checkpoint = GgufCheckpoint(tmp_path / "model.gguf")
    for each in checkpoint.names():
        np.testing.assert_array_equal(checkpoint.read(each), theirs[each].numpy())


def test_gpt2_reads_back_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 24, "n_inner": FEED}
    config = AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, **ours)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {k: v for k, v in random_state(model).items() if k != "lm_head.weight"}
    turned = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    tensors = converted(state, "gpt2", lambda n, a: a.T if n.endswith(turned) else a)
    keys = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
    metadata = {key: sizes()[key] for key in keys}
    metadata |= {"context_length": 24, "attention.layer_norm_epsilon": 1e-5}
    write(tmp_path / "m.gguf", "gpt2", metadata, tensors)
    checkpoint = GgufCheckpoint(tmp_path / "m.gguf")
    read = {each: checkpoint.read(each) for each in checkpoint.names()}
    for each, expected in state.items():
        assert checkpoint.shape(each) == expected.shape
        np.testing.assert_array_equal(read[each], expected)
    again = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**gguf_config(checkpoint.file)), dtype=torch.float32
    ).eval()
    again.load_state_dict({k: torch.from_numpy(v) for k, v in read.items()}, strict=False)
    again.tie_weights()
    tokens = torch.arange(20).reshape(2, 10)
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


def test_bert_reads_back_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=FEED,
        max_position_embeddings=30,
        layer_norm_eps=1e-6,
    )
    model = AutoModel.from_config(config, dtype=torch.float32, add_pooling_layer=False).eval()
    state = random_state(model)
    keys = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
    metadata = {key: sizes()[key] for key in keys}
    metadata |= {"context_length": 30, "attention.layer_norm_epsilon": 1e-6, "pooling_type": 1}
    write(tmp_path / "m.gguf", "bert", metadata, converted(state, "bert"))
    checkpoint = GgufCheckpoint(tmp_path / "m.gguf")
    assert set(checkpoint.names()) == set(state)
    again = AutoModel.from_config(
        AutoConfig.for_model(**gguf_config(checkpoint.file)),
        dtype=torch.float32,
        add_pooling_layer=False,
    ).eval()
    again.load_state_dict({n: torch.from_numpy(checkpoint.read(n)) for n in checkpoint.names()})
    tokens = torch.arange(20).reshape(2, 10)
    kinds = torch.tensor([[0] * 4 + [1] * 6] * 2)
    expected = model(tokens, token_type_ids=kinds).last_hidden_state
    torch.testing.assert_close(again(tokens, token_type_ids=kinds).last_hidden_state, expected)
