"""A Hugging Face ``config.json`` from the metadata of a GGUF file.

Shapes come from the tensors where possible: those will be loaded. Values that files omit and
llama.cpp hard-codes by architecture (layer patterns, attention scales) are listed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmopt.errors import SourceError
from llmopt.frontend.gguf.file import GgufFile
from llmopt.frontend.gguf.names import naming
from llmopt.frontend.gguf.rope import rope_scaling

_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
# all end a turn: the text's end, the turn's end, a message's end before a tool call
_ENDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
_POOLING = {1: "mean", 2: "cls", 3: "last"}


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """Return the config.json that the file's model would have as a Hugging Face folder.

    Raises:
        UnsupportedModelError: The architecture, or a feature of it, is unknown.
        SourceError: A required key is missing.
    """
    naming(file)
    config = _FAMILIES[file.architecture](file)
    config["vocab_size"] = _rows(file, "token_embd.weight")
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    # null if absent: a config class would fill an omitted one with another checkpoint's id
    config |= {key: file.metadata.get(name) for key, name in _TOKENS.items()}
    ends = list(dict.fromkeys(file.metadata[name] for name in _ENDS if name in file.metadata))
    config["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    return config


def gguf_pooling(file: GgufFile) -> str | None:
    """Return an encoder's pooling: ``"mean"``, ``"cls"``, ``"last"`` or None."""
    return _POOLING.get(file.value("pooling_type", 0))


def _rows(file: GgufFile, name: str) -> int:
    return _tensor_shape(file, name)[0]


def _tensor_shape(file: GgufFile, name: str) -> tuple[int, ...]:
    if name not in file.tensors:
        raise SourceError(file.path, f"lacks the tensor {name!r}", "download or convert it again")
    return file.tensors[name].shape


def _decoder(file: GgufFile, model_type: str, class_name: str) -> dict[str, Any]:
    """Return the entries of every decoder with rotary embeddings and RMS norms."""
    heads = file.number("attention.head_count")
    width = _head_width(file, heads)
    value_width = file.value("attention.value_length", width)
    if value_width != width:
        raise file.unsupported(f"values of width {value_width} with keys of width {width}")
    config = {
        "model_type": model_type,
        "architectures": [class_name],
        "hidden_size": file.number("embedding_length"),
        "intermediate_size": file.number("feed_forward_length"),
        "num_hidden_layers": file.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.number("attention.head_count_kv", heads),
        "head_dim": width,
        "hidden_act": "silu",
        "max_position_embeddings": file.number("context_length"),
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": file.number("rope.freq_base", 10000.0),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    scaling = rope_scaling(file)
    return config | ({"rope_scaling": scaling} if scaling else {}) | _partial(file, width)


def _head_width(file: GgufFile, heads: int) -> int:
    """Return the head width that the tensors have."""
    fused = "blk.0.attn_qkv.weight" in file.tensors
    if fused or not heads:
        return int(file.number("embedding_length") // max(heads, 1))
    return _rows(file, "blk.0.attn_q.weight") // int(heads)


def _partial(file: GgufFile, width: int) -> dict[str, Any]:
    rotated = file.value("rope.dimension_count", width)
    if rotated == width:
        return {}
    if file.architecture != "phi3":
        raise file.unsupported(f"partial rotary embeddings ({rotated} of {width} channels)")
    return {"partial_rotary_factor": rotated / width}


def _llama(file: GgufFile) -> dict[str, Any]:
    window = file.value("attention.sliding_window", 0)
    if not window:
        return _decoder(file, "llama", "LlamaForCausalLM")
    # the same arithmetic except for the window, which only Mistral's class has
    return _decoder(file, "mistral", "MistralForCausalLM") | {"sliding_window": window}


def _qwen2(file: GgufFile) -> dict[str, Any]:
    return _decoder(file, "qwen2", "Qwen2ForCausalLM") | {"use_sliding_window": False}


def _qwen3(file: GgufFile) -> dict[str, Any]:
    return _decoder(file, "qwen3", "Qwen3ForCausalLM") | {"use_sliding_window": False}


def _smollm3(file: GgufFile) -> dict[str, Any]:
    config = _decoder(file, "smollm3", "SmolLM3ForCausalLM")
    layers = range(config["num_hidden_layers"])
    # llama.cpp hard-codes that every fourth layer has no rotary
    return config | {
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in layers],
    }


def _granite(file: GgufFile) -> dict[str, Any]:
    return _decoder(file, "granite", "GraniteForCausalLM") | {
        "attention_multiplier": file.number("attention.scale"),
        "embedding_multiplier": file.number("embedding_scale", 1.0),
        "residual_multiplier": file.number("residual_scale", 1.0),
        "logits_scaling": file.number("logit_scale", 1.0),
    }


def _phi3(file: GgufFile) -> dict[str, Any]:
    config = _decoder(file, "phi3", "Phi3ForCausalLM")
    scaling = config.get("rope_scaling", {})
    original = scaling.get("original_max_position_embeddings")
    return config | {
        "sliding_window": file.value("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": original or config["max_position_embeddings"],
    }


def _gemma(file: GgufFile, model_type: str, class_name: str, full_every: int) -> dict[str, Any]:
    config = _decoder(file, model_type, class_name)
    sliding = _sliding(file, config["num_hidden_layers"], full_every)
    scale = file.value("attention.scale")
    return config | {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scale**-2 if scale else config["head_dim"],
        "sliding_window": file.number("attention.sliding_window"),
        "layer_types": ["sliding_attention" if each else "full_attention" for each in sliding],
        "attn_logit_softcapping": file.value("attn_logit_softcapping"),
        "final_logit_softcapping": file.value("final_logit_softcapping"),
    }


def _sliding(file: GgufFile, layers: int, full_every: int) -> list[bool]:
    pattern = file.value("attention.sliding_window_pattern", full_every)
    if isinstance(pattern, list):
        return [bool(each) for each in pattern]
    return [(layer + 1) % pattern != 0 for layer in range(layers)]


def _by_head_count(config: dict[str, Any]) -> dict[str, Any]:
    """Return the attention scale of the two 27 B Gemmas: by hidden size, not head width."""
    return {"query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]}


def _gemma2(file: GgufFile) -> dict[str, Any]:
    config = _gemma(file, "gemma2", "Gemma2ForCausalLM", 2)
    # llama.cpp recognizes the 27 B by its depth, too: files do not name it
    return config | (_by_head_count(config) if config["num_hidden_layers"] == 46 else {})


def _gemma3(file: GgufFile) -> dict[str, Any]:
    config = _gemma(file, "gemma3_text", "Gemma3ForCausalLM", 6)
    local = file.number("rope.freq_base_swa", 10000.0)
    config |= {"rope_local_base_freq": local}
    return config | (_by_head_count(config) if config["num_hidden_layers"] == 62 else {})


def _gpt2(file: GgufFile) -> dict[str, Any]:
    positions = file.number("context_length")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": file.number("embedding_length"),
        "n_inner": file.number("feed_forward_length"),
        "n_layer": file.number("block_count"),
        "n_head": file.number("attention.head_count"),
        "n_positions": positions,
        "n_ctx": positions,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": file.number("attention.layer_norm_epsilon"),
    }


def _bert(file: GgufFile) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "hidden_size": file.number("embedding_length"),
        "intermediate_size": file.number("feed_forward_length"),
        "num_hidden_layers": file.number("block_count"),
        "num_attention_heads": file.number("attention.head_count"),
        "max_position_embeddings": _rows(file, "position_embd.weight"),
        "type_vocab_size": _rows(file, "token_types.weight"),
        "layer_norm_eps": file.number("attention.layer_norm_epsilon"),
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
    }


_FAMILIES: dict[str, Callable[[GgufFile], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
    "granite": _granite,
    "phi3": _phi3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "bert": _bert,
}
