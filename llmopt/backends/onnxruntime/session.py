"""Run a written model in this process, for verification and measurement while compiling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt

from llmopt.errors import BackendUnavailableError

Arrays = dict[str, npt.NDArray[Any]]
Run = Callable[[Mapping[str, npt.NDArray[Any]]], Arrays]
_EXTERNAL: Final = "session.model_external_initializers_file_folder_path"


def open_session(model: Path, *, exact: bool = False) -> Run:
    """Return a function from inputs to outputs, by name.

    Args:
        model: The ``.onnx`` file.
        exact: Multiply quantized weights in float32 instead of int8, so that what is left of the
            error is the graph's and not the kernels' rounding.

    Raises:
        BackendUnavailableError: onnxruntime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise BackendUnavailableError("onnxruntime-cpu", "pip install 'llmopt[runtime]'") from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    source: Any = str(model)
    if exact:
        source = _in_float(model)
        options.add_session_config_entry(_EXTERNAL, str(model.parent))
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    optional = [value.name for value in session.get_overridable_initializers()]
    known = {value.name for value in session.get_inputs()} | set(optional)

    def run(feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        given = {name: array for name, array in feeds.items() if name in known}
        return dict(zip(names, session.run(names, given), strict=True))

    return run


def _in_float(model: Path) -> bytes:
    """Return the model with every product of rounded numbers done in float32."""
    import onnx

    proto = onnx.load(model, load_external_data=False)
    made = {output: node for node in proto.graph.node for output in node.output}
    nodes = []
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
        nodes.extend(_unrounded(node, made) if node.op_type == _INTEGER else [node])
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    data: bytes = proto.SerializeToString()
    return data


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
