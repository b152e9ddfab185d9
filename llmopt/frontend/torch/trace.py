"""PyTorch modules traced into ONNX graphs whose weights are read only when needed."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from llmopt.errors import UnsupportedModelError
from llmopt.frontend.tensors import Read, reader
from llmopt.frontend.torch.registry import shared_registry
from llmopt.ir.dialect import IR_VERSION, OPSET
from llmopt.ir.weights import Leaf


@dataclass(frozen=True)
class Traced:
    """A traced module.

    Args:
        model: Traced graph; weights are ``Leaf`` tensors named like the module's parameters.
        expected: Attentions and norms, counted in the module and its calls.
        limit: Longest sequence that the trace is valid for, if it is bounded.
    """

    model: ir.Model
    expected: Mapping[str, int]
    limit: int | None


def trace_module(
    module: torch.nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    dynamic_shapes: Any,
    read: Read | None = None,
) -> Traced:
    """Return the graph of ``module`` called with ``inputs``.

    Args:
        module: Module in eval mode; its parameters may be on the meta device.
        inputs: Example inputs, by name or in order.
        dynamic_shapes: Argument of ``torch.export.export``.
        read: Function from a parameter's name to its values; the module's own by default.

    Raises:
        UnsupportedModelError: torch cannot export the module; the message has its reason.
    """
    _reserve(module)
    args = () if isinstance(inputs, Mapping) else tuple(inputs)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    label = type(module).__name__
    with quiet(), torch.no_grad():
        try:
            exported = torch.export.export(
                module,
                args,
                kwargs,
                dynamic_shapes=dynamic_shapes,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        except Exception as error:  # torch's exporter raises whatever the module does
            raise UnsupportedModelError(
                label,
                [f"torch.export failed: {_first_lines(error)}"],
                "make it traceable (no data-dependent branches), or pass dynamic_shapes=",
            ) from error
    tensors = {  # a tied parameter has several names, and any of them may be read
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    return translate(exported, read or reader(tensors), module)


def _reserve(module: torch.nn.Module) -> None:
    """Give parameters on the meta device an address; no page of it is ever touched.

    torch refuses to mix the meta device with buffers on the CPU.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                setattr(part, name, torch.nn.Parameter(empty, requires_grad=False))


def translate(
    exported: torch.export.ExportedProgram, read: Read, module: torch.nn.Module | None = None
) -> Traced:
    """Return the ONNX graph of an exported program, with parameters bound to ``read``."""
    with quiet(), torch.no_grad(), shared_registry():
        try:
            program = torch.onnx.export(
                exported, dynamo=True, opset_version=OPSET, optimize=False, verbose=False
            )
        except Exception as error:  # torch's exporter raises whatever the module does
            raise UnsupportedModelError(
                type(module).__name__ if module is not None else "exported program",
                [f"no ONNX equivalent: {_first_lines(error)}"],
                "replace that operation in the module by one that ONNX supports",
            ) from error
    assert program is not None
    model = program.model
    model.ir_version = IR_VERSION
    signature = exported.graph_signature
    _bind(model, {*signature.parameters, *signature.buffers}, exported, read)
    simplify(model)
    label(model.graph)
    return Traced(model, _expected(exported, module), _limit(exported))


def simplify(model: ir.Model) -> None:
    """Fold constants and shape arithmetic, but no weights."""
    from onnxscript import optimizer

    with quiet(), weights_as_inputs(model):
        optimizer.optimize_ir(model, input_size_limit=1 << 14, output_size_limit=1 << 16)


@contextlib.contextmanager
def weights_as_inputs(model: ir.Model) -> Iterator[None]:
    """Make every unread weight an input within the context.

    Weights must not be read (they may not exist yet), and two that happen to be equal must not be
    merged: a quantized model would store them separately.
    """
    graph = model.graph
    tensors = {
        name: value.const_value
        for name, value in graph.initializers.items()
        if isinstance(value.const_value, Leaf)
    }
    for name in tensors:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    try:
        yield
    finally:  # by name: a converter may have replaced the graph
        graph = model.graph
        for value in [v for v in graph.inputs if v.name in tensors]:
            graph.inputs.remove(value)
            value.const_value = tensors[str(value.name)]
            graph.register_initializer(value)


def label(graph: ir.Graph) -> None:
    """Name each node after its module, ``layers.0.attention/MatMul``."""
    taken: dict[str, int] = {}
    for node in graph:
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, ""))
        scope = scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_empty") else ""
        label = f"{scope}/{node.op_type}" if scope else node.op_type
        taken[label] = taken.get(label, 0) + 1
        node.name = label if taken[label] == 1 else f"{label}_{taken[label]}"
        node.metadata_props.clear()


_SCOPES = "pkg.torch.onnx.name_scopes"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's notes on optional packages and its own deprecations."""
    names = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _bind(
    model: ir.Model, names: set[str], exported: torch.export.ExportedProgram, read: Read
) -> None:
    """Bind parameters and persistent buffers to ``read``; computed buffers stay constants."""
    state = exported.state_dict
    first = _first_names(state)
    for name, value in model.graph.initializers.items():
        if name not in names or value.const_value is None:
            continue
        tensor = value.const_value
        sizes = list(tensor.shape.numpy())
        if name not in state or math.prod(sizes) <= 1 or tensor.dtype not in FLOATS:
            continue
        source = first[name]
        value.const_value = Leaf(source, _typed(read, source, tensor.dtype), tensor.dtype, sizes)


def _first_names(state: Mapping[str, Any]) -> dict[str, str]:
    """Return each parameter's first name: a tied one has several, and is read by one."""
    known: dict[Any, str] = {}
    first = {}
    for name, tensor in state.items():
        storage = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        first[name] = known.setdefault(storage, name)
    return first


def _typed(read: Read, name: str, dtype: ir.DataType) -> Callable[[], npt.NDArray[Any]]:
    return lambda: np.asarray(read(name)).astype(dtype.numpy(), copy=False)


FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


def _expected(
    exported: torch.export.ExportedProgram, module: torch.nn.Module | None
) -> dict[str, int]:
    """Count attentions and norms: by module class if one is named so, else by calls."""
    calls = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]

    def called(*names: str) -> int:
        return sum(any(name in call for name in names) for call in calls)

    attention = called("scaled_dot_product_attention", "aten.softmax", "aten._softmax")
    norm = called("layer_norm", "rms_norm", "aten.rsqrt", "aten.sqrt")
    named = 0 if module is None else _outermost(module, "norm")
    return {"attention": attention, "norm": named or norm}


def _outermost(module: torch.nn.Module, word: str) -> int:
    """Count the outermost modules whose class name contains ``word``."""
    if word in type(module).__name__.lower():
        return 1
    return sum(_outermost(child, word) for child in module.children())


def _limit(exported: torch.export.ExportedProgram) -> int | None:
    uppers = [float(bound.upper) for bound in exported.range_constraints.values()]
    finite = [int(upper) for upper in uppers if upper < 1 << 30]
    return min(finite) if finite else None


def _first_lines(error: BaseException) -> str:
    """Return the informative part of a torch error on one line."""
    while error.__cause__ is not None and "Failed to" in str(error):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:300] or type(error).__name__
