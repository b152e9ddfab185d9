"""Small Programs for tests: from text or a definition, and what they compute."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from llmopt.frontend.onnx.program_file import ROLES
from llmopt.interface.arrays import Arrays
from llmopt.interface.facts import ModelFacts
from llmopt.interface.signature import Port, Role, Signature
from llmopt.ir import graph as g
from llmopt.ir.evaluator import Evaluator
from llmopt.ir.feeds import Case, feeds
from llmopt.ir.landmarks import Landmark, restore
from llmopt.ir.program import Facts, Program
from llmopt.ir.weights import Leaf
from llmopt.passes import PASSES, Outcome
from llmopt.passes.pipeline import Pipeline

HEAD = '<ir_version: 11, opset_import: ["" : 25]>\n'
_MARKS = {landmark.value for landmark in Landmark}
_CACHE = re.compile(r"(past|present|source)_(key|value)_?(\d*)")


def program(
    text: str, *, limit: int = 64, weights: Iterable[str] = (), vocabulary: int = 11
) -> Program:
    """Return the Program of a graph in ONNX's text form; roles are told by names.

    Args:
        text: The graph, without the header; a node's label is ``[name]``, and that of a
            landmark marks it.
        limit: The most tokens in a sequence.
        weights: Initializers that are parameters of a source: unread until needed.
        vocabulary: The number of tokens.
    """
    proto = onnx.parser.parse_model(text if text.startswith("<") else HEAD + text)
    proto = onnx.shape_inference.infer_shapes(proto, data_prop=True, strict_mode=True)
    model = ir.from_proto(proto)
    labels = {str(node.name): str(node.outputs[0].name) for node in model.graph if node.name}
    restore(model.graph, {label: labels[label] for label in _MARKS & {*labels}})
    for node in model.graph:
        node.name = node.name or node.outputs[0].name
    for name in weights:
        _unread(model.graph.initializers[name])
    inputs = tuple(_port(value) for value in model.graph.inputs)
    outputs = tuple(_port(value) for value in model.graph.outputs)
    known = ModelFacts(max_length=limit, vocabulary=vocabulary)
    return Program(model, Signature(inputs, outputs), Facts(model=known))


def bound(text: str, arrays: Mapping[str, npt.NDArray[Any]]) -> Program:
    """Return ``program(text)`` with some inputs made weights of a source, unread."""
    made = program(text)
    for value in list(made.graph.inputs):
        array = arrays.get(str(value.name))
        if array is not None:
            made.graph.inputs.remove(value)
            value.const_value = _leaf(str(value.name), array)
            made.graph.register_initializer(value)
    ports = tuple(port for port in made.signature.inputs if port.name not in arrays)
    return Program(made.model, Signature(ports, made.signature.outputs), made.facts)


def _leaf(name: str, array: npt.NDArray[Any]) -> Leaf:
    return Leaf(name, array.copy, ir.DataType.from_numpy(array.dtype), array.shape)


def _unread(value: ir.Value) -> None:
    tensor = value.const_value
    assert tensor is not None
    value.const_value = _leaf(str(value.name), tensor.numpy())


def _port(value: ir.Value) -> Port:
    name = str(value.name)
    role, layer = ROLES.get(name, Role.OTHER), None
    if found := _CACHE.fullmatch(name):
        role, layer = Role(f"{found[1]}_{found[2]}"), int(found[3] or 0)
    assert value.dtype is not None
    dims = tuple("B" if str(d).startswith("?") else d for d in g.shape(value) or ())
    return Port(name, role, value.dtype.numpy().name, dims, layer)


def inputs(of: Program, case: Case, vocabulary: int = 11) -> Arrays:
    """Return random inputs for one case; an overridable initializer keeps its default."""
    given = feeds(of.signature, case, vocabulary)
    return {name: array for name, array in given.items() if name not in of.graph.initializers}


def evaluate(of: Program, given: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Run a Program of standard operators one by one, with no optimizer."""
    return Evaluator(of.model).run(given)


def run(of: Program, given: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Run a Program, lowered or not, in onnxruntime without its own optimizations."""
    return open_session(ir.to_proto(of.model).SerializeToString(), given)


def open_session(model: bytes | Path, given: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Run a model file or its bytes in onnxruntime."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, bytes) else str(model)
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(given)), strict=True))


def apply(name: str, to: Program) -> Outcome:
    """Run one pass by its name and options, checked as the pipeline checks it."""
    found: list[Outcome] = []
    Pipeline.parse(name).run(
        to, lambda *ran: found.append(Outcome(ran[2].applied, [*ran[2].missed]))
    )
    return found[0]


def operators(of: Program) -> list[str]:
    """Return the operators of a Program in order."""
    return [node.op_type for node in of.graph]


def only(of: Program, op_type: str) -> ir.Node:
    """Return the one node of this operator."""
    (node,) = [node for node in of.graph if node.op_type == op_type]
    return node


def reasons(outcome: Outcome) -> str:
    """Return every reason of an outcome, in one text."""
    return "; ".join(miss.reason for miss in outcome.missed)


def error_rel(
    got: npt.NDArray[Any], want: npt.NDArray[Any], rows: npt.NDArray[np.bool_] | None = None
) -> float:
    """Return max|a-b| / max|b|, over the unpadded ``rows`` [B, S] where given."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if rows is not None:
        got, want = got[rows], want[rows]
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


ALL_PASSES = tuple(PASSES)


def defined(config: Mapping[str, Any], *, seed: int = 0, limit: int = 64) -> Program:
    """Return the Program of a family's definition, of a Hugging Face config, randomly weighted."""
    import torch

    from llmopt.frontend.definitions.definition import trace_definition
    from llmopt.models import Definition
    from llmopt.models.definition import FAMILIES

    torch.set_num_threads(1)
    family = str(config["model_type"])
    definition = Definition(FAMILIES[family].parse(config), family, {})
    shapes = {name: list(p.shape) for name, p in definition.module().named_parameters()}
    facts = Facts(model=ModelFacts(max_length=limit, vocabulary=config["vocab_size"]))
    return trace_definition(definition, _random(shapes, seed), facts)


def _random(shapes: Mapping[str, list[int]], seed: int) -> Any:
    """Return a reader of random weights: each its own, norms around 1."""
    order = {name: index for index, name in enumerate(shapes)}

    def read(name: str) -> npt.NDArray[Any]:
        rng = np.random.default_rng([seed, order[name]])
        array = rng.standard_normal(shapes[name], np.float32) * np.float32(0.3)
        return array + np.float32("norm" in name and name.endswith("weight"))

    return read
