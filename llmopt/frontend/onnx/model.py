"""ONNX files: weights stay in the file, the graph is converted to the dialect's opset."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes import common

from llmopt.errors import SourceError, UnsupportedModelError
from llmopt.frontend.base import Source, SourceOptions
from llmopt.frontend.meaning import TracedModel, finish
from llmopt.frontend.onnx.reference import OnnxReference
from llmopt.frontend.onnx.saved import KEY, open_saved
from llmopt.frontend.torch.trace import FLOATS, label, quiet, simplify, weights_as_inputs
from llmopt.interface.facts import SourceRecord
from llmopt.ir import graph as g
from llmopt.ir.dialect import IR_VERSION, OPSET
from llmopt.ir.weights import Leaf

_AGAIN: Final = "export or download it again"
_BLOCK_BYTES: Final = 1 << 20


def open_onnx(path: Path, options: SourceOptions) -> Source:
    """Return the Program and the reference of an ONNX file.

    Raises:
        SourceError: The file is damaged, or its external data is missing or truncated.
        UnsupportedModelError: An operator is not ONNX's own, or the opset cannot be converted.
    """
    model = _load(path)
    files = _check_external(path, model)
    if KEY in model.metadata_props:
        return open_saved(path, model)
    _inline(path, model)
    _refuse_caches(path, model)
    expected = count_expected(model.graph)
    _without_initializer_inputs(model.graph)
    names = [str(v.name) for v in model.graph.inputs]
    outputs = [str(v.name) for v in model.graph.outputs]
    weights = _lazy(model)
    _raise_opset(path, model)
    if any(node.metadata_props for node in model.graph):
        label(model.graph)
    _infer_shapes(model)
    simplify(model)
    traced = TracedModel(
        record=SourceRecord(path.stem, "onnx", _digest([path, *files])),
        family=path.stem,
        model=model,
        outputs=_known(outputs),
        expected=expected,
        limit=None,
        reference=lambda out: OnnxReference(path, names, out, weights),
    )
    return finish(traced, options)


def _load(path: Path) -> ir.Model:
    try:
        model = ir.load(path)
    except (DecodeError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        line = str(error).partition("\n")[0][:160]
        raise SourceError(path, f"not an ONNX model ({line})", _AGAIN) from error
    if len(model.graph) == 0 or not model.graph.outputs:
        raise SourceError(path, "an ONNX model without nodes or outputs", _AGAIN)
    return model


def _check_external(path: Path, model: ir.Model) -> list[Path]:
    """Return the files of external data.

    Raises:
        SourceError: A file is outside the model's folder, missing or too short.
    """
    files: dict[Path, None] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = Path(tensor.location)
        if location.is_absolute() or ".." in location.parts:
            raise SourceError(
                path, f"the data of {value.name!r} is outside its folder, in {location}", _AGAIN
            )
        file = path.parent / location
        if not file.is_file():
            raise SourceError(
                path, f"its data file {location} is missing", f"copy it to {path.parent}"
            )
        end, size = (tensor.offset or 0) + (tensor.length or tensor.nbytes), file.stat().st_size
        if end > size or (tensor.length or tensor.nbytes) < tensor.nbytes:
            problem = f"truncated: {value.name!r} ends at byte {end} of {size}"
            raise SourceError(file, problem, _AGAIN)
        files[file] = None
    return list(files)


def _inline(path: Path, model: ir.Model) -> None:
    """Inline functions, and refuse operators that are not ONNX's own.

    Raises:
        UnsupportedModelError: An operator is foreign; the message lists all.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain == "ai.onnx":
            node.domain = ""
    common.InlinePass()(model)
    foreign = Counter(
        f"{node.domain}.{node.op_type}"
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.domain != ""
    )
    if foreign:
        listed = [f"{count} x {name}" for name, count in sorted(foreign.items())]
        hint = "export it again without fused or vendor operators; llmopt fuses by itself"
        raise UnsupportedModelError(path.name, listed, hint)


def _refuse_caches(path: Path, model: ir.Model) -> None:
    caches = [str(v.name) for v in model.graph.inputs if str(v.name).startswith("past_key_values")]
    if caches:
        raise UnsupportedModelError(
            path.name,
            [f"it takes a KV cache ({caches[0]}, ...)"],
            "export it without one (use_cache=False), or compile its checkpoint",
        )


def _without_initializer_inputs(graph: ir.Graph) -> None:
    """Remove initializers from the inputs, where older models list them all."""
    for value in list(graph.inputs):
        if value.is_initializer():
            graph.inputs.remove(value)


def count_expected(graph: ir.Graph) -> dict[str, int]:
    """Return the number of attentions and norms: softmaxes, and roots of means."""
    attention = len(g.nodes(graph, "Softmax", "Attention"))
    norms = len(g.nodes(graph, "LayerNormalization", "RMSNormalization"))
    roots = [n for n in g.nodes(graph, "Sqrt", "Pow") if _of_mean(n)]
    return {"attention": attention, "norm": norms + len(roots)}


def _of_mean(node: ir.Node) -> bool:
    """Return whether a node is the root, or the power of -1/2, of a mean plus an epsilon."""
    if node.op_type == "Pow" and g.scalar(g.operand(node, 1)) != -0.5:
        return False
    inner = g.producer(node.inputs[0], "Add", "Max", "Clip")
    parts = inner.inputs if inner is not None else node.inputs[:1]
    return any(g.producer(part, "ReduceMean", "Div") is not None for part in parts)


def _lazy(model: ir.Model) -> dict[str, Callable[[], npt.NDArray[Any]]]:
    """Make every weight a tensor that is read on demand; return each weight's reader."""
    common.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=1)(model)
    reads: dict[str, Callable[[], npt.NDArray[Any]]] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in FLOATS and tensor.size > 1:
            reads[name] = _reader(tensor)
            sizes = list(tensor.shape.numpy())
            value.const_value = Leaf(name, reads[name], tensor.dtype, sizes)
        elif isinstance(tensor, ir.ExternalTensor):  # shapes and index tables: read often
            value.const_value = ir.tensor(_reader(tensor)(), tensor.dtype, name=name)
    return reads


def _reader(tensor: ir.TensorProtocol) -> Callable[[], npt.NDArray[Any]]:
    """Return a function that copies a tensor out of its file, mapped only during the call."""
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth < 8:
        return tensor.numpy
    file, start = Path(tensor.path), tensor.offset or 0
    dtype, sizes = tensor.dtype.numpy(), tensor.shape.numpy()

    def read() -> npt.NDArray[Any]:
        mapped = np.memmap(file, np.uint8, "r", start, (int(np.prod(sizes)) * dtype.itemsize,))
        return np.array(mapped).view(dtype).reshape(sizes)

    return read


def _raise_opset(path: Path, model: ir.Model) -> None:
    """Convert to the dialect's opset.

    Raises:
        UnsupportedModelError: The converter failed; the message has its reason.
    """
    from onnxscript import version_converter

    version = model.graph.opset_imports.get("") or model.graph.opset_imports.pop("ai.onnx", 0)
    try:
        if version > OPSET:
            raise ValueError("it is newer")  # noqa: TRY301 - one message for whatever fails
        if version < OPSET:
            with quiet(), weights_as_inputs(model):
                version_converter.convert_version(model, OPSET, fallback=True)
    except Exception as error:  # the converter raises whatever an adapter does
        line = str(error).partition("\n")[0][:200]
        raise UnsupportedModelError(
            path.name,
            [f"opset {version} cannot be converted to {OPSET}: {line}"],
            "export it again with a newer opset",
        ) from error
    model.graph.opset_imports.clear()
    model.graph.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION


def _infer_shapes(model: ir.Model) -> None:
    """Infer the shape of every value: older exporters omit them, and reshape by computed sizes."""
    for value in model.graph.inputs:
        sizes = g.shape(value) or []
        value.shape = ir.Shape(
            [
                f"d{axis}_{value.name}" if str(d).startswith("?") else d
                for axis, d in enumerate(sizes)
            ]
        )
    with weights_as_inputs(model), quiet():
        common.ShapeInferencePass(data_prop=True)(model)


def _known(outputs: list[str]) -> list[str]:
    """Return names of outputs, empty where an exporter generated them."""
    return [
        n if not any(c.isdigit() for c in n) and n not in ("output", "out") else "" for n in outputs
    ]


def _digest(files: list[Path]) -> str:
    combined = hashlib.sha256()
    for block in _blocks(files):
        combined.update(block)
    return combined.hexdigest()


def _blocks(files: list[Path]) -> Iterator[bytes]:
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                yield block
