"""Names and layouts of each architecture's tensors in GGUF and in Hugging Face checkpoints.

The tables are data. A layout names a change of the converter that is undone here:

- ``unpermute-q``, ``unpermute-k``: rows of each head were interleaved for ggml's rotary.
- ``minus-one``: Gemma's norms are stored as weight + 1.
- ``transpose``: GPT-2's ``Conv1D`` weights were transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llmopt.frontend.gguf.file import GgufFile

_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
_QK_NORM = {
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
}
_GEMMA2 = _LLAMA | {
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_PHI3 = _LLAMA | {
    "blk.{}.attn_qkv": "model.layers.{}.self_attn.qkv_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.gate_up_proj",
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk.{}.attn_norm": "transformer.h.{}.ln_1",
    "blk.{}.attn_qkv": "transformer.h.{}.attn.c_attn",
    "blk.{}.attn_output": "transformer.h.{}.attn.c_proj",
    "blk.{}.ffn_norm": "transformer.h.{}.ln_2",
    "blk.{}.ffn_up": "transformer.h.{}.mlp.c_fc",
    "blk.{}.ffn_down": "transformer.h.{}.mlp.c_proj",
}
_BERT = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
    "blk.{}.attn_q": "encoder.layer.{}.attention.self.query",
    "blk.{}.attn_k": "encoder.layer.{}.attention.self.key",
    "blk.{}.attn_v": "encoder.layer.{}.attention.self.value",
    "blk.{}.attn_output": "encoder.layer.{}.attention.output.dense",
    "blk.{}.attn_output_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "blk.{}.ffn_up": "encoder.layer.{}.intermediate.dense",
    "blk.{}.ffn_down": "encoder.layer.{}.output.dense",
    "blk.{}.layer_output_norm": "encoder.layer.{}.output.LayerNorm",
}
_PERMUTED = {"blk.{}.attn_q": "unpermute-q", "blk.{}.attn_k": "unpermute-k"}
_SHIFTED = {name: "minus-one" for name in (*_GEMMA2, *_QK_NORM) if name.endswith("norm")}
_CONV1D = {
    f"blk.{{}}.{name}": "transpose" for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
}


@dataclass(frozen=True)
class Naming:
    """Names and layouts of one architecture.

    Attributes:
        names: ggml base name (``{}`` for the layer) -> Hugging Face base name.
        layouts: ggml base name -> change to undo in its weight.
    """

    names: Mapping[str, str]
    layouts: Mapping[str, str]


# which architectures permute q and k: those whose converter derives from Llama's
ARCHITECTURES: dict[str, Naming] = {
    "llama": Naming(_LLAMA, _PERMUTED),
    "granite": Naming(_LLAMA, _PERMUTED),
    "smollm3": Naming(_LLAMA, _PERMUTED),
    "qwen2": Naming(_LLAMA, {}),
    "qwen3": Naming(_LLAMA | _QK_NORM, {}),
    "gemma2": Naming(_GEMMA2, _SHIFTED),
    "gemma3": Naming(_GEMMA2 | _QK_NORM, _SHIFTED),
    "phi3": Naming(_PHI3, {}),
    "gpt2": Naming(_GPT2, _CONV1D),
    "bert": Naming(_BERT, {}),
}
# tables that the config has instead (see config.py)
_CONFIGURED = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
_LAYER = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True)
class TensorLayout:
    """A Hugging Face tensor in a GGUF file.

    Attributes:
        source: ggml name.
        layout: Change to undo, ``""`` for none.
    """

    source: str
    layout: str


def naming(file: GgufFile) -> Naming:
    """Return the names and layouts of the file's architecture.

    Raises:
        UnsupportedModelError: The architecture is unknown.
    """
    architecture = ARCHITECTURES.get(file.architecture)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise file.unsupported(f"GGUF architecture {file.architecture!r} (known: {known})")
    return architecture


def huggingface_names(file: GgufFile) -> dict[str, TensorLayout]:
    """Return Hugging Face name -> ggml name and layout, for every tensor of the file.

    Raises:
        UnsupportedModelError: A tensor is unknown; dropping it would change the model.
    """
    table = naming(file)
    result, unknown = {}, []
    for source in file.tensors:
        if source in _CONFIGURED:
            continue
        stem, _, suffix = source.rpartition(".")
        layer = _LAYER.match(stem)
        general = _LAYER.sub("blk.{}.", stem)
        target = table.names.get(general)
        if target is None or suffix not in {"weight", "bias"}:
            unknown.append(source)
            continue
        name = f"{target.format(layer and layer[1])}.{suffix}"
        result[name] = TensorLayout(source, _layout(table, general, suffix))
    if unknown:
        some = ", ".join(unknown[:5])
        model = f"a {file.architecture!r} model"
        raise file.unsupported(f"{len(unknown)} tensors are unknown in {model}: {some}")
    return result


def _layout(table: Naming, general: str, suffix: str) -> str:
    layout = table.layouts.get(general, "")
    # a bias has rows to permute, but nothing to transpose
    return "" if suffix == "bias" and layout == "transpose" else layout
