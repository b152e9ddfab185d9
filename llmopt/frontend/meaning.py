"""A traced graph becomes a Program: roles, dimensions, task and limits are inferred.

Names are not trusted where the source can be run: a model counts as causal if later tokens do not
change earlier outputs of the source itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import onnx_ir as ir

from llmopt.errors import UnknownNameError, UnsupportedModelError, UsageError
from llmopt.frontend.base import Source, SourceOptions
from llmopt.frontend.causality import is_causal
from llmopt.frontend.dims import name_dims
from llmopt.frontend.input_names import role_of
from llmopt.frontend.reference import Reference
from llmopt.frontend.tables import longest
from llmopt.interface.facts import ModelFacts, SourceRecord
from llmopt.interface.signature import Port, Role, Signature
from llmopt.ir import graph as g
from llmopt.ir.program import Facts, Program

TASKS: Final = ("generate", "embed", "encode", "raw")
UNBOUNDED: Final = 512  # tokens, for a model without a limit
_OUTPUTS: Final[Mapping[str, Role]] = {
    "logits": Role.LOGITS,
    "last_hidden_state": Role.HIDDEN,
    "sentence_embedding": Role.EMBEDDING,
}


@dataclass(frozen=True, kw_only=True)
class TracedModel:
    """A graph, and the facts that its frontend knows.

    Args:
        record: Name, kind and digest of the source.
        family: Name of the architecture.
        model: Traced graph; its inputs are named.
        outputs: Names of the source's outputs, in order; empty where one has no name.
        expected: Attentions and norms, counted in the source.
        limit: Longest sequence that the graph is valid for, if it is bounded.
        reference: Function from names of the outputs to the source itself.
        notes: Remarks for the user.
    """

    record: SourceRecord
    family: str
    model: ir.Model
    outputs: Sequence[str]
    expected: Mapping[str, int]
    limit: int | None
    reference: Callable[[Sequence[str]], Reference]
    notes: tuple[str, ...] = ()


def finish(traced: TracedModel, options: SourceOptions) -> Source:
    """Return the source of a traced graph: roles, dimensions, task and limits are inferred.

    Raises:
        UnknownNameError: The task does not exist.
        UsageError: The model does not fit the requested task.
        UnsupportedModelError: The batch or length is fixed, or two outputs share a name.
    """
    if options.task not in (None, *TASKS):
        raise UnknownNameError("task", str(options.task), TASKS)
    program = Program(traced.model, _drafted(traced), Facts())
    drafted = program.signature
    vocabulary, hidden = _token_table(program.graph, drafted.inputs) or (0, 0)
    limits = (traced.limit, longest(program, vocabulary), options.max_length)
    limit = min(filter(None, limits), default=UNBOUNDED)
    main = _main_output(drafted)
    causal = False
    if main is not None and drafted.find(Role.TOKENS) is not None:
        reference = traced.reference([port.name for port in drafted.outputs])
        causal = is_causal(reference, drafted, main, vocabulary, min(limit, 7))
    reading = _OutputNaming(main, vocabulary, hidden, causal=causal)
    outputs = tuple(
        _output(port, label, reading)
        for port, label in zip(drafted.outputs, traced.outputs, strict=True)
    )
    _rename(program.graph, outputs)
    program.signature = Signature(drafted.inputs, outputs)
    task = _task(program.signature, options.task, causal=causal)
    _learn(program, traced, task, vocabulary, hidden)
    model = replace(program.facts.model, max_length=limit)
    program.learn(model=model)
    reference = traced.reference([port.name for port in outputs])
    return Source(traced.record.name, program, reference, traced.notes)


@dataclass(frozen=True)
class _OutputNaming:
    """Facts that outputs are named by.

    Args:
        main: Name of the output that has a vector for every token.
        vocabulary: Rows of the token embedding.
        hidden: Columns of the token embedding.
        causal: Whether no token changes an earlier output.
    """

    main: str | None
    vocabulary: int
    hidden: int
    causal: bool


def _drafted(traced: TracedModel) -> Signature:
    """Return the signature with roles for inputs and the source's names for outputs."""
    graph = traced.model.graph
    inputs = _inputs(graph)
    fixed = [
        f"input {port.name!r} is fixed at {list(port.shape)}"
        for port in inputs
        if port.role != Role.OTHER and any(isinstance(dim, int) for dim in port.shape)
    ]
    if fixed:
        raise UnsupportedModelError(
            traced.family, fixed, "export it with a dynamic batch and a dynamic length"
        )
    name_dims(graph, {port.name: port.shape for port in inputs})
    inputs = tuple(
        replace(port, shape=tuple(g.shape(value) or port.shape))
        for port, value in zip(inputs, graph.inputs, strict=True)
    )
    labels = _labels(traced.outputs, len(graph.outputs), traced.family)
    outputs = [_port(value, name) for value, name in zip(graph.outputs, labels, strict=True)]
    return Signature(inputs, tuple(outputs))


def _learn(program: Program, traced: TracedModel, task: str, vocabulary: int, hidden: int) -> None:
    pooled = task != "embed" or program.signature.find(Role.EMBEDDING) is not None
    model = ModelFacts(
        family=traced.family,
        layers=traced.expected.get("attention", 0),
        hidden=hidden,
        vocabulary=vocabulary or _width(program.signature.find(Role.LOGITS)),
        pooling=None if pooled else "mean",
    )
    program.learn(task=task, model=model, source=traced.record, expected=dict(traced.expected))


def _inputs(graph: ir.Graph) -> tuple[Port, ...]:
    """Return the inputs with roles; a single integer [B, S] is tokens whatever its name."""
    roles = {str(v.name): role_of(str(v.name)) for v in graph.inputs}
    matrices = [v for v in graph.inputs if _is_integer(v) and g.rank(v) == 2]
    for value in graph.inputs:
        if roles[str(value.name)] is Role.TOKENS and value not in matrices:
            roles[str(value.name)] = None
    if (
        len(free := [v for v in matrices if roles[str(v.name)] is None]) == 1
        and Role.TOKENS not in roles.values()
    ):
        roles[str(free[0].name)] = Role.TOKENS
    if len(matrices) == 1:
        roles[str(matrices[0].name)] = Role.TOKENS
    return tuple(_port(v, str(v.name), roles[str(v.name)] or Role.OTHER) for v in graph.inputs)


def _is_integer(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.INT64, ir.DataType.INT32)


def _port(value: ir.Value, name: str, role: Role = Role.OTHER) -> Port:
    if role not in (Role.OTHER, Role.TOKENS) and g.rank(value) != 2:
        role = Role.OTHER  # a mask [B, 1, S, T] is not a padding mask
    sizes = g.shape(value)
    if sizes is None or value.dtype is None:
        raise UnsupportedModelError(
            name, ["its shape or element type is unknown"], "export it with shapes inferred"
        )
    letters = ("B", "S")
    dims = [
        letters[axis] if isinstance(size, str) and axis < 2 and value.is_graph_input() else size
        for axis, size in enumerate(sizes)
    ]
    return Port(name, role, str(value.dtype.numpy().name), tuple(dims))


def _labels(names: Sequence[str], count: int, family: str) -> list[str]:
    if len(names) != count:
        raise UnsupportedModelError(
            family,
            [f"it returns {len(names)} tensors, the trace has {count}"],
            "return tensors only",
        )
    labels = [name or f"output_{i}" for i, name in enumerate(names)]
    if len(set(labels)) != count:
        raise UnsupportedModelError(family, ["two outputs share a name"], "name them differently")
    return labels


def _token_table(graph: ir.Graph, inputs: Sequence[Port]) -> tuple[int, int] | None:
    """Return rows and columns of the token embedding."""
    tokens = {p.name for p in inputs if p.role == Role.TOKENS}
    for node in g.nodes(graph, "Gather"):
        index = g.operand(node, 1)
        cast = g.producer(index, "Cast")
        source = g.operand(cast, 0) if cast is not None else index
        rows, columns = g.static(node.inputs[0], 0), g.static(node.inputs[0], 1)
        if source.name in tokens and source.is_graph_input() and rows and columns:
            return rows, columns
    return None


def _main_output(signature: Signature) -> str | None:
    """Return the name of the output per token: the first floating-point [B, S, ...]."""
    for port in signature.outputs:
        free = [dim for dim in port.shape[:2] if isinstance(dim, str)]
        if len(port.shape) == 3 and "float" in port.dtype and len(free) == 2:
            return port.name
    return None


def _output(port: Port, label: str, known: _OutputNaming) -> Port:
    """Return an output with its role; if the main output has no name, its role names it."""
    role, name = _OUTPUTS.get(label, Role.OTHER), port.name
    if port.name == known.main and role is Role.OTHER:
        width = _width(port)
        scores = width == known.vocabulary or (known.causal and width != known.hidden)
        role = Role.LOGITS if scores else Role.HIDDEN
    if not label and role is not Role.OTHER:
        name = "logits" if role is Role.LOGITS else "last_hidden_state"
    return replace(port, name=name, role=role)


def _width(port: Port | None) -> int:
    last = port.shape[-1] if port is not None and port.shape else 0
    return last if isinstance(last, int) else 0


def _rename(graph: ir.Graph, ports: Sequence[Port]) -> None:
    taken = {str(v.name): v for node in graph for v in node.outputs}
    for value, port in zip(graph.outputs, ports, strict=True):
        if (other := taken.get(port.name)) is not None and other is not value:
            other.name = g.unused(graph, f"{port.name}_inner")
        value.name = port.name


def _task(signature: Signature, task: str | None, *, causal: bool) -> str:
    tokens = signature.find(Role.TOKENS) is not None
    generates = causal and signature.find(Role.LOGITS) is not None
    inferred = "generate" if generates else "encode" if tokens else "raw"
    if inferred == "encode" and signature.find(Role.EMBEDDING):
        inferred = "embed"
    possible = {
        "generate": generates,
        "embed": bool(signature.find(Role.EMBEDDING) or signature.find(Role.HIDDEN)),
        "encode": tokens,
        "raw": True,
    }
    if task is not None and not possible[task]:
        lacks = {
            "generate": "the model is not causal, or has no logits for every token",
            "embed": "the model has no hidden states among its outputs",
            "encode": "the model takes no tokens",
        }[task]
        raise UsageError(f"--task {task}: {lacks}; omit --task to compile it for {inferred!r}")
    return task or inferred
