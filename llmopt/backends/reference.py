"""The Program itself: an ONNX file in the dialect, run operator by operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Final

import onnx_ir as ir
from typing_extensions import override

from llmopt.backends.base import TOLERANCE, Availability, Backend, Demand, Lowered
from llmopt.backends.onnxruntime.artifact import component_files, installed
from llmopt.interface.arrays import Arrays, Run
from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.attention import PRECISION
from llmopt.ir.dialect import OPSET
from llmopt.ir.program import Program
from llmopt.ir.saving import save_all
from llmopt.passes.base import Pass
from llmopt.passes.convert_float import LEFT, NARROW
from llmopt.quantization.schemes import Cast, Scheme

DATA: Final = "model.onnx.data"
_INSTALL: Final = "pip install 'llmopt[compile]'"
_TYPES: Final = ("to", "dtype", "output_dtype", PRECISION)
"""Attributes that name an element type."""


@dataclass(frozen=True)
class ReferenceBackend(Backend):
    """The Program as it is, run by onnx's reference evaluator, corrected where it is wrong."""

    name: ClassVar[str] = "reference"
    summary: ClassVar[str] = "the Program itself, run operator by operator in numpy; slow"
    schemes: ClassVar[frozenset[str]] = frozenset(
        {"w4", "w6", "w8", "w8a8-dynamic", "fp16", "bf16"}
    )
    takes_components: ClassVar[bool] = True

    @override
    def tolerance(self, scheme: Scheme | None) -> float:
        return LEFT[scheme.dtype] if isinstance(scheme, Cast) else TOLERANCE

    @override
    def available(self) -> Availability:
        missing = "" if all(map(find_spec, ("onnx", "onnx_ir"))) else _INSTALL
        return Availability(missing, missing)

    @override
    def check(self, program: Program) -> list[str]:
        from llmopt.ir.evaluator import lacking

        return lacking(program.model)

    @override
    def passes(self, scheme: Scheme | None) -> tuple[Pass, ...]:
        return ()

    @override
    def write(self, program: Program, folder: Path, demand: Demand) -> Lowered:
        if program.signature.has_cache:
            program.learn(model=replace(program.facts.model, cache="concat"))
        files = component_files(program)
        save_all({files[n]: model for n, model in program.components.items()}, folder, DATA)
        entry = files.pop(program.main)
        versions: dict[str, str | int] = {"onnx": installed("onnx"), "opset": OPSET}
        return Lowered(entry, program, versions, others=files)

    @override
    def open(self, entry: Path, *, exact: bool = False) -> Run:
        return runner(ir.load(entry), exact=exact)


def runner(model: ir.Model, *, exact: bool) -> Run:
    """Return a function from inputs to outputs of a model of standard operators.

    Args:
        model: Model to evaluate; it is not changed.
        exact: Whether to compute in float32 what the model rounds.

    Raises:
        LlmoptError: An operator has no implementation.
    """
    from llmopt.ir.evaluator import Evaluator

    if exact:
        model = model.clone()
        unround(model)
    evaluator = Evaluator(model)

    def run(feeds: Mapping[str, Any]) -> Arrays:
        known = {name: evaluator.types[name] for name in feeds if name in evaluator.types}
        given = {
            name: feeds[name].astype(dtype.numpy()) if dtype else feeds[name]
            for name, dtype in known.items()
        }
        return evaluator.run(given)

    return run


def unround(model: ir.Model) -> None:
    """Make rounded activations float32; weights keep their rounded values."""
    for node in g.nodes(model.graph, "DequantizeLinear"):
        rounded = g.producer(node.inputs[0], "QuantizeLinear")
        if rounded is not None:
            g.replace(node.outputs[0], g.operand(rounded, 0))
    graph = model.graph
    for value in (*graph.inputs, *graph.initializers.values()):
        _widen_value(value)
    for node in graph:
        _widen_node(node)


def _widen_node(node: ir.Node) -> None:
    for value in node.outputs:
        _widen_value(value)
    for attribute in list(node.attributes.values()):
        if attribute.name in _TYPES and attribute.as_int() in NARROW.values():
            node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(_WIDE))
        elif attribute.type == ir.AttributeType.TENSOR and _is_narrow(attribute.value.dtype):
            tensor = weights.cast(attribute.value, _WIDE)
            node.attributes[attribute.name] = ir.AttrTensor(attribute.name, tensor)


def _widen_value(value: ir.Value) -> None:
    if _is_narrow(value.dtype):
        value.type = ir.TensorType(_WIDE)
    if value.const_value is not None and _is_narrow(value.const_value.dtype):
        value.const_value = weights.cast(value.const_value, _WIDE)


def _is_narrow(dtype: ir.DataType | None) -> bool:
    return dtype in NARROW.values()


_WIDE: Final = ir.DataType.FLOAT
