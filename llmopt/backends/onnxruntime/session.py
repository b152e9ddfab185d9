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
    model: Path, *, exact: bool = False, widened: bool = False, place: Provider | None = None
) -> Run:
    """Return a function from inputs to outputs, by name.

    Args:
        model: The ``.onnx`` file.
        exact: Multiply quantized weights in float32 instead of int8, so that what is left of the
            error is the graph's and not the kernels' rounding.
        widened: Compute in float32 what the model says is of 16 bits; its weights are as they are.
        place: Provider to run on; the CPU by default.

    Raises:
        BackendUnavailableError: onnxruntime is not installed, or the provider is not here.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise BackendUnavailableError("onnxruntime", "pip install 'llmopt[runtime]'") from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    source: Any = str(model)
    held: tuple[list[str], list[Any]] = ([], [])  # ONNX Runtime reads these where they are
    if exact or widened:
        proto = _read(model, exact=exact)
        if widened:
            held = _widen(proto, model.parent, ort)
            options.add_external_initializers(*held)
        options.add_session_config_entry(_EXTERNAL, str(model.parent))
        source = proto.SerializeToString()
    with variable(_EXPERTS, "fp32") if exact else contextlib.nullcontext():
        session = start(ort, source, options, place or Provider())
    names = [output.name for output in session.get_outputs()]
    takes = (*session.get_inputs(), *session.get_overridable_initializers())
    wide = {value.name for value in takes if value.type == "tensor(float)"}
    known = {value.name for value in takes}

    def run(feeds: Mapping[str, npt.NDArray[Any]], _held: object = held) -> Arrays:
        given = {
            name: array.astype(np.float32) if name in wide else array
            for name, array in feeds.items()
            if name in known
        }
        return dict(zip(names, session.run(names, given), strict=True))

    return run


def _read(model: Path, *, exact: bool) -> Any:
    """Return the model without its weights; if ``exact``, codes are multiplied in float32."""
    import onnx

    proto = onnx.load(model, load_external_data=False)
    if not exact:
        return proto
    made = {output: node for node in proto.graph.node for output in node.output}
    nodes = []
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
        nodes.extend(_unrounded(node, made) if node.op_type == _INTEGER else [node])
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def _unrounded(node: Any, made: Mapping[str, Any]) -> list[Any]:
    """Return MatMulIntegerToFloat as a product of what was rounded and the weight it stands for."""
    import onnx

    source = made[node.input[0]].input[0]  # of the QuantizeLinear
    whole, scaled = f"{node.name}.whole", f"{node.name}.scaled"
    return [
        onnx.helper.make_node("Cast", [node.input[1]], [whole], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Mul", [whole, node.input[3]], [scaled]),
        onnx.helper.make_node("MatMul", [source, scaled], list(node.output)),
    ]


_INTEGER: Final = "MatMulIntegerToFloat"


def _widen(proto: Any, folder: Path, ort: Any) -> tuple[list[str], list[Any]]:
    """Let everything of 16 bits be of float32; return names and numbers of the large weights."""
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
    held: dict[str, Any] = {}
    for tensor in proto.graph.initializer:
        if tensor.data_type in narrow:
            array = onnx.numpy_helper.to_array(tensor, str(folder)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
            if array.nbytes > _INLINE_BYTES:
                held[tensor.name] = ort.OrtValue.ortvalue_from_numpy(array)
                onnx.external_data_helper.set_external_data(tensor, "held", 0, array.nbytes)
                tensor.ClearField("raw_data")
    return list(held), list(held.values())
