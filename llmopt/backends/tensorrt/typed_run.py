"""Run a typed network in onnxruntime on the CPU, before TensorRT sees it.

The file is the one that TensorRT parses, with two changes: the cache has the capacity that a call
needs instead of the engine's, so that a test of 40 tokens does not copy 8192 slots, and bfloat16,
which onnxruntime has no CPU kernels for, is float32 with every value rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from llmopt.errors import BackendUnavailableError, LlmoptError
from llmopt.interface.arrays import Array, Arrays, Run
from llmopt.interface.signature import Role

_EXTERNAL: Final = "session.model_external_initializers_file_folder_path"
_STEP: Final = 64  # slots: the step by which the cache grows, so that onnxruntime sees few shapes
_FLOAT, _BFLOAT16 = 1, 16  # onnx.TensorProto


@dataclass(frozen=True)
class _NetworkCaches:
    """The cache of a network.

    Args:
        mask: Name of the mask [B, C].
        presents: Name of the present key or value by the name of its past.
    """

    mask: str
    presents: Mapping[str, str]


def open_typed(network: Path, *, exact: bool = False) -> Run:
    """Return a function from inputs to outputs of a typed network.

    A cache may have any number of slots: it is resized to what the call needs. Without
    ``write_indices`` new tokens go behind those that the mask counts.

    Args:
        network: The ONNX file; its weights are beside it.
        exact: Whether to leave 8-bit activations unrounded, so that the error is the graph's alone.

    Raises:
        BackendUnavailableError: onnxruntime is not installed.
        LlmoptError: onnxruntime has no kernel for an operator of the network.
    """
    import onnx

    try:
        import onnxruntime as ort
    except ImportError as error:
        raise BackendUnavailableError("onnxruntime-cpu", "pip install 'llmopt[runtime]'") from error
    proto = onnx.load(network, load_external_data=False)
    caches = _free_capacity(proto)
    in_float32(proto)
    if exact:
        _leave_unrounded(proto)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # no Q/DQ fusion: fused int8 products would round at other points than TensorRT
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry(_EXTERNAL, str(network.parent))
    state = ort.capi.onnxruntime_pybind11_state
    try:
        session = ort.InferenceSession(
            proto.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            # onnxruntime 1.32 drops a Relu in front of float8 codes, as if these had no sign
            disabled_optimizers=["ReluQuantRewrite"],
        )
    except (state.NotImplemented, state.InvalidGraph, state.Fail) as error:
        problem = str(error).strip().partition("\n")[0]
        hint = "use --verify off to skip verification"
        raise LlmoptError(f"onnxruntime cannot run the typed network: {problem}; {hint}") from error
    inputs = {value.name: _NUMPY[value.type] for value in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Mapping[str, Array]) -> Arrays:
        resized = dict(feeds) if caches is None else _with_capacity(feeds, caches)
        resized.setdefault("logits_to_keep", np.asarray(1, np.int64))
        arrays: Arrays = {
            name: resized[name].astype(dtype, copy=False) for name, dtype in inputs.items()
        }
        return dict(zip(names, session.run(names, arrays), strict=True))

    return run


_NUMPY: Final = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def _free_capacity(proto: Any) -> _NetworkCaches | None:
    """Make the number of slots dynamic; return the caches, None where there are none."""
    values = {value.name: value for value in (*proto.graph.input, *proto.graph.output)}
    scatters = [node for node in proto.graph.node if node.op_type == "TensorScatter"]
    if not scatters:
        return None
    presents = {node.input[0]: node.output[0] for node in scatters}
    capacity = values[scatters[0].input[0]].type.tensor_type.shape.dim[2].dim_value
    for name in (*presents, *presents.values()):
        values[name].type.tensor_type.shape.dim[2].dim_param = "C"
    masks = [value for value in proto.graph.input if _is_mask(value, capacity)]
    masks[0].type.tensor_type.shape.dim[1].dim_param = "C"
    return _NetworkCaches(masks[0].name, presents)


def _is_mask(value: Any, capacity: int) -> bool:
    dims = value.type.tensor_type.shape.dim
    return len(dims) == 2 and dims[1].dim_value == capacity


def _with_capacity(feeds: Mapping[str, Array], caches: _NetworkCaches) -> dict[str, Array]:
    """Return inputs whose cache and mask have as many slots as the tokens need."""
    mask = feeds[caches.mask]
    batch, end = mask.shape
    slots = -(-end // _STEP) * _STEP
    new = feeds["input_ids"].shape[1]
    resized = {caches.mask: _resized(mask, 1, slots)}
    resized[Role.WRITE_INDICES] = np.full(batch, end - new, np.int64)
    resized |= {name: _resized(feeds[name], 2, slots) for name in caches.presents}
    return {**feeds, **resized}


def _resized(array: Array, axis: int, size: int) -> Array:
    """Return ``array`` padded with zeros, or truncated, along one axis."""
    have = array.shape[axis]
    if have >= size:
        return np.ascontiguousarray(np.take(array, range(size), axis) if have > size else array)
    shape = list(array.shape)
    shape[axis] = size - have
    return np.concatenate([array, np.zeros(shape, array.dtype)], axis=axis)


def in_float32(proto: Any) -> None:
    """Compute in float32 what the network computes in bfloat16, rounding every value to it."""
    import onnx

    values = (*proto.graph.input, *proto.graph.output, *proto.graph.value_info)
    wide = [value for value in values if _is_bfloat16(value)]
    for value in wide:
        value.type.tensor_type.elem_type = _FLOAT
    rounded = {value.name for value in wide}
    nodes = []
    for tensor in proto.graph.initializer:
        if tensor.data_type == _BFLOAT16:
            name = tensor.name
            tensor.name = f"{name}.bfloat16"
            nodes.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=_FLOAT))
    for node in proto.graph.node:
        nodes.extend(_rounded(node, rounded))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _leave_unrounded(proto: Any) -> None:
    """Replace DequantizeLinear(QuantizeLinear(x)) by x."""
    producers = {output: node for node in proto.graph.node for output in node.output}
    for node in proto.graph.node:
        codes = producers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if codes is not None and codes.op_type == "QuantizeLinear":
            node.op_type, x = "Identity", codes.input[0]
            del node.input[:], node.attribute[:]
            node.input.append(x)


def _is_bfloat16(value: Any) -> bool:
    return bool(value.type.tensor_type.elem_type == _BFLOAT16)


def _rounded(node: Any, rounded: set[str]) -> list[Any]:
    """Return a node whose outputs of bfloat16 are float32, rounded there and back."""
    import onnx

    for attribute in node.attribute:
        if attribute.name in {"to", "output_dtype"} and attribute.i == _BFLOAT16:
            attribute.i = _FLOAT
    nodes = [node]
    for index, name in enumerate(node.output):
        if name in rounded:
            raw, narrow = f"{name}.raw", f"{name}.bfloat16"
            node.output[index] = raw
            nodes.append(onnx.helper.make_node("Cast", [raw], [narrow], to=_BFLOAT16))
            nodes.append(onnx.helper.make_node("Cast", [narrow], [name], to=_FLOAT))
    return nodes
