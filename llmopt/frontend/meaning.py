"""Find out what the inputs and outputs of a traced graph mean, and make a Program of it.

Nothing here believes a name alone where the source can be asked: a model counts as causal when
later tokens do not move earlier outputs of the source itself.
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
UNBOUNDED: Final = 512  # tokens, of a model that shows no limit
_OUTPUTS: Final[Mapping[str, Role]] = {
    "logits": Role.LOGITS,
    "last_hidden_state": Role.HIDDEN,
    "sentence_embedding": Role.EMBEDDING,
}


@dataclass(frozen=True, kw_only=True)
class TracedModel:
    """A graph, and what the frontend that read it knows.

    Args:
        record: Where it came from.
        family: What the architecture is called.
        model: Its graph; inputs are named.
        outputs: What the source calls its outputs, in order; empty where it gives no name.
        expected: Attentions and norms, counted from the source.
        limit: The longest sequence that the graph holds for, if it is bounded.
        reference: Returns the source itself, given names for the outputs.
        notes: What a user should know.
    """

    record: SourceRecord
    family: str
    model: ir.Model
    outputs: Sequence[str]
    expected: Mapping[str, int]
    limit: int | None
    reference: Callable[[Sequence[str]], Reference]
    notes: tuple[str, ...] = ()


def finish(found: TracedModel, options: SourceOptions) -> Source:
    """Return the source of a graph: roles, dimensions, task and limits found out.

    Raises:
        UnknownNameError: there is no such task.
        UsageError: the model is not for the task that was asked for.
        UnsupportedModelError: its batch or length is fixed, or its outputs are not told apart.
    """
    if options.task not in (None, *TASKS):
        raise UnknownNameError("task", str(options.task), TASKS)
    program = Program(found.model, _drafted(found), Facts())
    drafted = program.signature
    vocabulary, hidden = _token_table(program.graph, drafted.inputs) or (0, 0)
    limits = (found.limit, longest(program, vocabulary), options.max_length)
    limit = min(filter(None, limits), default=UNBOUNDED)
    main = _main_output(drafted)
    causal = False
    if main is not None and drafted.find(Role.TOKENS) is not None:
        reference = found.reference([port.name for port in drafted.outputs])
        causal = is_causal(reference, drafted, main, vocabulary, min(limit, 7))
    reading = _OutputNaming(main, vocabulary, hidden, causal=causal)
    outputs = tuple(
        _output(port, label, reading)
        for port, label in zip(drafted.outputs, found.outputs, strict=True)
    )
    _rename(program.graph, outputs)
    program.signature = Signature(drafted.inputs, outputs)
    task = _task(program.signature, options.task, causal=causal)
    _learn(program, found, task, vocabulary, hidden)
    model = replace(program.facts.model, max_length=limit)
    program.learn(model=model)
    reference = found.reference([port.name for port in outputs])
    return Source(found.record.name, program, reference, found.notes)


@dataclass(frozen=True)
class _OutputNaming:
    """What is known when outputs get their names.

    Args:
        main: The output with numbers for every token.
        vocabulary: Rows of the matrix that tokens are looked up in.
        hidden: Its columns.
        causal: Whether no token moves an output before it.
    """

    main: str | None
    vocabulary: int
    hidden: int
    causal: bool


def _drafted(found: TracedModel) -> Signature:
    """Return inputs with roles, and outputs by the names of the source, dimensions named."""
    graph = found.model.graph
    inputs = _inputs(graph)
    fixed = [
        f"input {port.name!r} is fixed at {list(port.shape)}"
        for port in inputs
        if port.role != Role.OTHER and any(isinstance(dim, int) for dim in port.shape)
    ]
    if fixed:
        raise UnsupportedModelError(
            found.family, fixed, "export it with a dynamic batch and a dynamic length"
        )
    name_dims(graph, {port.name: port.shape for port in inputs})
    inputs = tuple(
        replace(port, shape=tuple(g.shape(value) or port.shape))
        for port, value in zip(inputs, graph.inputs, strict=True)
    )
    labels = _labels(found.outputs, len(graph.outputs), found.family)
    outputs = [_port(value, name) for value, name in zip(graph.outputs, labels, strict=True)]
    return Signature(inputs, tuple(outputs))


def _learn(program: Program, found: TracedModel, task: str, vocabulary: int, hidden: int) -> None:
    pooled = task != "embed" or program.signature.find(Role.EMBEDDING) is not None
    model = ModelFacts(
        family=found.family,
        layers=found.expected.get("attention", 0),
        hidden=hidden,
        vocabulary=vocabulary or _width(program.signature.find(Role.LOGITS)),
        pooling=None if pooled else "mean",
    )
    program.learn(task=task, model=model, source=found.record, expected=dict(found.expected))


def _inputs(graph: ir.Graph) -> tuple[Port, ...]:
    """Return the inputs with their roles; the only [B, S] of integers are tokens by any name."""
    roles = {str(v.name): role_of(str(v.name)) for v in graph.inputs}
    whole = [v for v in graph.inputs if _is_integer(v) and g.rank(v) == 2]
    for value in graph.inputs:
        if roles[str(value.name)] is Role.TOKENS and value not in whole:
            roles[str(value.name)] = None
    if (
        len(free := [v for v in whole if roles[str(v.name)] is None]) == 1
        and Role.TOKENS not in roles.values()
    ):
        roles[str(free[0].name)] = Role.TOKENS
    if len(whole) == 1:
        roles[str(whole[0].name)] = Role.TOKENS
    return tuple(_port(v, str(v.name), roles[str(v.name)] or Role.OTHER) for v in graph.inputs)


def _is_integer(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.INT64, ir.DataType.INT32)


def _port(value: ir.Value, name: str, role: Role = Role.OTHER) -> Port:
    if role not in (Role.OTHER, Role.TOKENS) and g.rank(value) != 2:
        role = Role.OTHER  # a mask of [B, 1, S, T] is not one of padding
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


def _labels(given: Sequence[str], count: int, family: str) -> list[str]:
    if len(given) != count:
        raise UnsupportedModelError(
            family, [f"{len(given)} tensors come out, {count} were traced"], "return tensors only"
        )
    labels = [name or f"output_{i}" for i, name in enumerate(given)]
    if len(set(labels)) != count:
        raise UnsupportedModelError(family, ["two outputs have one name"], "name them differently")
    return labels


def _token_table(graph: ir.Graph, inputs: Sequence[Port]) -> tuple[int, int] | None:
    """Return rows and columns of the matrix that tokens are looked up in."""
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
    """Return the output that has numbers for every token: the first real [B, S, ...]."""
    for port in signature.outputs:
        free = [dim for dim in port.shape[:2] if isinstance(dim, str)]
        if len(port.shape) == 3 and "float" in port.dtype and len(free) == 2:
            return port.name
    return None


def _output(port: Port, label: str, known: _OutputNaming) -> Port:
    """Return an output with its role; the one for every token is named by it if it has no name."""
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


def _task(signature: Signature, wanted: str | None, *, causal: bool) -> str:
    tokens = signature.find(Role.TOKENS) is not None
    generates = causal and signature.find(Role.LOGITS) is not None
    found = "generate" if generates else "encode" if tokens else "raw"
    if found == "encode" and signature.find(Role.EMBEDDING):
        found = "embed"
    possible = {
        "generate": generates,
        "embed": bool(signature.find(Role.EMBEDDING) or signature.find(Role.HIDDEN)),
        "encode": tokens,
        "raw": True,
    }
    if wanted is not None and not possible[wanted]:
        lacks = {
            "generate": "it is not causal, or gives no logits for every token",
            "embed": "it gives no hidden states",
            "encode": "it takes no tokens",
        }[wanted]
        raise UsageError(f"--task {wanted}: {lacks}; leave --task out, this model is for {found!r}")
    return wanted or found
