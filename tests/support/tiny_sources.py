"""Tiny sources to compile on the command line."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

LAYERS, HEADS, GROUPS, WIDTH, HIDDEN, FEED, VOCABULARY = 2, 4, 2, 8, 32, 48, 60
CONFIG: Final[dict[str, Any]] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": WIDTH,
    "hidden_size": HIDDEN,
    "intermediate_size": FEED,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    """Return the weights of the tiny Llama, as a checkpoint names them."""
    rng = np.random.default_rng(5)

    def weight(*shape: int) -> np.ndarray[Any, Any]:
        return rng.normal(0, 0.5, shape).astype(np.float32)

    found = {"model.embed_tokens.weight": weight(VOCABULARY, HIDDEN)}
    found["model.norm.weight"] = weight(HIDDEN)
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        found |= {
            f"{layer}.input_layernorm.weight": weight(HIDDEN),
            f"{layer}.post_attention_layernorm.weight": weight(HIDDEN),
            f"{layer}.self_attn.q_proj.weight": weight(HEADS * WIDTH, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": weight(GROUPS * WIDTH, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": weight(GROUPS * WIDTH, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": weight(HIDDEN, HEADS * WIDTH),
            f"{layer}.mlp.gate_proj.weight": weight(FEED, HIDDEN),
            f"{layer}.mlp.up_proj.weight": weight(FEED, HIDDEN),
            f"{layer}.mlp.down_proj.weight": weight(HIDDEN, FEED),
        }
    return found


def llama_folder(folder: Path, **changes: Any) -> Path:
    """Write a Hugging Face folder; ``changes`` go into its config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    save_file(tensors(), folder / "model.safetensors")
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def bigram_file(path: Path) -> Path:
    """Write an ONNX model whose logits depend on each token alone, with one layer norm."""
    rng = np.random.default_rng(6)
    names = {"table": (VOCABULARY, WIDTH), "scale": (WIDTH,), "head": (WIDTH, VOCABULARY)}
    weights = [
        onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        for name, shape in names.items()
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"], "embed"),
        helper.make_node("LayerNormalization", ["rows", "scale"], ["normed"], "norm"),
        helper.make_node("MatMul", ["normed", "head"], ["logits"], "project"),
    ]
    tokens = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "S"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "S", VOCABULARY])
    graph = helper.make_graph(nodes, "bigram", [tokens], [logits], weights)
    opsets = [helper.make_opsetid("", 25)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), path)
    return path


def gguf_file(path: Path) -> Path:
    """Write a GGUF file that is whole, though no model's."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.ones((VOCABULARY, HIDDEN), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def cut(path: Path) -> Path:
    """Take away the second half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


class Bomb:
    """Unpickling it writes a file.

    Args:
        marker: The file.
    """

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what pickle calls."""
        return Path.write_text, (self.marker, "executed")


def torch_archive(path: Path, content: object) -> Path:
    """Write ``content`` as torch.save does, without importing torch."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return path
