"""Run a written model in this process, for verification and measurement while compiling."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llmopt.backends.environment import variable
from llmopt.errors import BackendUnavailableError
from llmopt.interface.arrays import Arrays, Run
from llmopt.runtime.engines.providers import Provider, start

_EXTERNAL: Final = "session.model_external_initializers_file_folder_path"
_EXPERTS: Final = "ORT_QMOE_CPU_QNBIT_GEMM"
"""Lets QMoE multiply codes of 8 bits in float32: an attribute says so for 4 bits alone.

Source: onnxruntime 1.32, ``moe_quantization_cpu.cc``; read while a session prepares weights.
"""
_INLINE_BYTES: Final = 1024
"""ONNX Runtime may need small constants, sizes and axes, while it reads the model."""


def open_session(
    model: Path, *, exact: bool = False, widened: bool = False, provider: Provider | None = None
) -> Run:
    """Return a function from inputs to outputs, by name.

    Args:
        model: The ``.onnx`` file.
        exact: Whether to multiply quantized weights in float32 instead of int8, so that the error
            is the graph's alone, without the kernels' rounding.
        widened: Whether to compute in float32 what the model computes in 16 bits, weights as given.
        provider: Execution provider; the CPU by default.

    Raises:
        BackendUnavailableError: onnxruntime is not installed, or the provider is not available.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise BackendUnavailableError("onnxruntime", "pip install 'llmopt[runtime]'") from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    source: Any = str(model)
    external: tuple[list[str], list[Any]] = ([], [])  # ONNX Runtime does not copy these
    if exact or widened:
        proto = _read(model, exact=exact)
        if widened:
            external = _widen(proto, model.parent, ort)
            options.add_external_initializers(*external)
        options.add_session_config_entry(_EXTERNAL, str(model.parent))
        source = proto.SerializeToString()
    with variable(_EXPERTS, "fp32") if exact else contextlib.nullcontext():
        session = start(ort, source, options, provider or Provider())
    names = [output.name for output in session.get_outputs()]
    takes = (*session.get_inputs(), *session.get_overridable_initializers())
    wide = {value.name for value in takes if value.type == "tensor(float)"}
    known = {value.name for value in takes}

    def run(feeds: Mapping[str, npt.NDArray[Any]], _external: object = external) -> Arrays:
        cast = {
            name: array.astype(np.float32) if name in wide else array
            for name, array in feeds.items()
            if name in known
        }
        return dict(zip(names, session.run(names, cast), strict=True))

    return run


def _read(model: Path, *, exact: bool) -> Any:
    """Return the model without its weights; if ``exact``, codes are multiplied in float32."""
    import onnx

    proto = onnx.load(model, load_external_data=False)
    if not exact:
        return proto
    producers = {output: node for node in proto.graph.node for output in node.output}
    nodes = []
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
        nodes.extend(_unrounded(node, producers) if node.op_type == _INTEGER else [node])
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def _unrounded(node: Any, producers: Mapping[str, Any]) -> list[Any]:
    """Return MatMulIntegerToFloat as MatMul of the unrounded activation and dequantized weight."""
    import onnx

    source = producers[node.input[0]].input[0]  # of the QuantizeLinear
    codes, scaled = f"{node.name}.whole", f"{node.name}.scaled"
    return [
        onnx.helper.make_node("Cast", [node.input[1]], [codes], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Mul", [codes, node.input[3]], [scaled]),
        onnx.helper.make_node("MatMul", [source, scaled], list(node.output)),
    ]


_INTEGER: Final = "MatMulIntegerToFloat"


def _widen(proto: Any, folder: Path, ort: Any) -> tuple[list[str], list[Any]]:
    """Make all 16-bit values float32; return the names and arrays of the large weights."""
    import onnx

    narrow = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    values = (*proto.graph.input, *proto.graph.output, *proto.graph.value_info)
    for value in values:
        if value.type.tensor_type.elem_type in narrow:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i in narrow:
                attribute.i = onnx.TensorProto.FLOAT
    large: dict[str, Any] = {}
    for tensor in proto.graph.initializer:
        if tensor.data_type in narrow:
            array = onnx.numpy_helper.to_array(tensor, str(folder)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
            if array.nbytes > _INLINE_BYTES:
                large[tensor.name] = ort.OrtValue.ortvalue_from_numpy(array)
                onnx.external_data_helper.set_external_data(tensor, "held", 0, array.nbytes)
                tensor.ClearField("raw_data")
    return list(large), list(large.values())
