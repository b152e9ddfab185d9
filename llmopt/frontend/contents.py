"""Contents of model files, read from their headers alone, for ``llmopt inspect``."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llmopt.errors import LlmoptError, SourceError

if TYPE_CHECKING:
    from onnx import ValueInfoProto

_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads",),
    "hidden": ("hidden_size", "n_embd", "dim"),
    "vocabulary": ("vocab_size",),
    "max_length": ("max_position_embeddings", "n_positions"),
}
"""Facts, and the keys that configs have for them."""


def onnx_contents(path: Path) -> dict[str, Any]:
    """Return operators, weights, inputs and outputs of an ONNX file; external data is not read.

    Raises:
        SourceError: The file is not an ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise SourceError(path, f"not an ONNX model ({error})", "export it again") from error
    graph = model.graph
    if not graph.node and not graph.output:
        raise SourceError(path, "an ONNX model without nodes or outputs", "export it again")
    weights = [(_type(w.data_type), math.prod(w.dims)) for w in graph.initializer]
    names = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in graph.node)
    known = {w.name for w in graph.initializer}
    return {
        "kind": "onnx",
        "opsets": {each.domain: each.version for each in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "operators": dict(names.most_common()),
        "weights": len(weights),
        "parameters": sum(size for _, size in weights),
        "types": _types(weights),
        "inputs": [_port(each) for each in graph.input if each.name not in known],
        "outputs": [_port(each) for each in graph.output],
    }


def _type(number: int) -> str:
    import onnx

    name: str = onnx.TensorProto.DataType.Name(number)
    return name.lower()


def _port(value: ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    sizes = [d.dim_param or str(d.dim_value or "?") for d in tensor.shape.dim]
    return f"{value.name} {_type(tensor.elem_type)} [{', '.join(sizes)}]"


def checkpoint_contents(path: Path) -> dict[str, Any]:
    """Return architecture, sizes and element types of a checkpoint.

    Raises:
        SourceNotFoundError: The folder holds no weights.
        SourceError: A file is damaged.
        PickleRefusedError: Reading it would execute code.
    """
    from llmopt.frontend.huggingface.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    sizes = {name: math.prod(checkpoint.shape(name)) for name in checkpoint.names()}
    config = _config(path)
    return {
        "kind": "checkpoint",
        "architecture": _architecture(config),
        **{key: _first(config, names) for key, names in _KEYS.items()},
        "tensors": len(sizes),
        "parameters": sum(sizes.values()),
        "types": _types((checkpoint.dtype(name), size) for name, size in sizes.items()),
        "compiles": _compiles(config, sizes),
    }


def _types(tensors: Iterable[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """Return the number of tensors and parameters of each element type."""
    counts: dict[str, dict[str, int]] = {}
    for kind, size in tensors:
        entry = counts.setdefault(kind, {"tensors": 0, "parameters": 0})
        entry["tensors"] += 1
        entry["parameters"] += size
    return dict(sorted(counts.items(), key=lambda item: -item[1]["parameters"]))


def _config(path: Path) -> dict[str, Any]:
    """Return the config that belongs to the weights, empty if there is none."""
    folder = path if path.is_dir() else path.parent
    if path.suffix == ".gguf":
        return _gguf_config(path)
    file = folder / "config.json"
    if not file.is_file():
        ggufs = sorted(folder.glob("*.gguf")) if path.is_dir() else []
        return _gguf_config(ggufs[0]) if ggufs else {}
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise SourceError(file, f"not JSON ({error})", "download it again") from error
    return config if isinstance(config, dict) else {}


def _gguf_config(path: Path) -> dict[str, Any]:
    from llmopt.frontend.gguf.config import gguf_config
    from llmopt.frontend.gguf.file import read_gguf

    file = read_gguf(path)
    try:
        return gguf_config(file)
    except LlmoptError:  # inspect shows models that do not compile, too
        keys = {"num_hidden_layers": "block_count", "hidden_size": "embedding_length"}
        sizes = {name: file.value(key) for name, key in keys.items()}
        return {"model_type": file.architecture} | sizes


def _architecture(config: Mapping[str, Any]) -> str:
    classes = config.get("architectures") or []
    kind = str(config.get("model_type", ""))
    return f"{kind} ({', '.join(classes)})" if classes else kind


def _first(config: Mapping[str, Any], names: Iterable[str]) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _compiles(config: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return whether the architecture compiles, in words."""
    from llmopt.models import define

    if not config:
        return "unknown: no config.json next to the weights"
    try:
        return f"yes, as family {define(config, list(names)).family}"
    except LlmoptError as error:
        return f"no: {error}"
