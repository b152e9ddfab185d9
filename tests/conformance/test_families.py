"""Every family, from a folder that transformers wrote to an artifact that ONNX Runtime runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
import transformers

import llmopt

pytestmark = pytest.mark.slow

# B 3, S 9, H 6, G 2, D 16, E 48, F 60, V 101, L 2: no two are equal
DECODER: Final[Mapping[str, Any]] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER: Final[Mapping[str, Any]] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DECODERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"head_dim": 8, "partial_rotary_factor": 0.5},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_inner": 60, "n_positions": 64},
}
ENCODERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1, "max_position_embeddings": 70},
    "distilbert": {"dim": 48, "n_layers": 2, "n_heads": 6, "hidden_dim": 60},
    "mpnet": {"max_position_embeddings": 70},
}


def written(kind: str, options: Mapping[str, Any], folder: Path, auto: Any) -> Any:
    """Write a random checkpoint, moved from its initial values, and return transformers' model."""
    torch.manual_seed(3)
    model = auto.from_config(transformers.AutoConfig.for_model(kind, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def padded() -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and a left-padded mask, [3, 9]."""
    ids = np.random.default_rng(0).integers(3, 101, (3, 9))
    mask = np.ones((3, 9), np.int64)
    mask[1, :2] = mask[2, :4] = 0
    return np.where(mask == 1, ids, 0), mask


def close(found: np.ndarray, wanted: np.ndarray, mask: np.ndarray, bound: float) -> None:
    real = mask == 1
    error = np.abs(found - wanted)[real].max() / np.abs(wanted[real]).max()
    assert error <= bound


@pytest.mark.parametrize("kind", DECODERS)
def test_decoder(kind: str, tmp_path: Path) -> None:
    folder, options = tmp_path / kind, {**DECODER, **DECODERS[kind]}
    model = written(kind, options, folder, transformers.AutoModelForCausalLM)
    ids, mask = padded()
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    with torch.inference_mode():
        wanted = model(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions),
        ).logits.numpy()

    artifact = llmopt.compile(
        folder, output=tmp_path / "out", require=["attention=all", "norm=all"]
    )

    runner = llmopt.load(artifact)
    close(runner.logits(ids, prefill=5, mask=mask), wanted, mask, 1e-4)
    close(runner.logits(ids, prefill=9, mask=mask), wanted, mask, 1e-4)


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoder(kind: str, tmp_path: Path) -> None:
    folder, options = tmp_path / kind, {**ENCODER, **ENCODERS[kind]}
    model = written(kind, options, folder, transformers.AutoModel)
    ids, mask = padded()
    if kind in ("roberta", "mpnet"):  # their positions count what is no padding token
        ids = np.where(mask == 1, ids, model.config.pad_token_id)
    with torch.inference_mode():
        wanted = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state

    artifact = llmopt.compile(
        folder, output=tmp_path / "out", require=["attention=all", "norm=all"]
    )

    runner = llmopt.load(artifact)
    feeds = {"input_ids": ids, "attention_mask": mask}
    if any(port.role == "token_types" for port in artifact.manifest.signature.inputs):
        feeds["token_type_ids"] = np.zeros_like(ids)
    close(runner.run(feeds)["last_hidden_state"], wanted.numpy(), mask, 1e-4)
