"""Find out what the inputs and outputs of a traced graph mean, and make a Program of it.

Nothing here believes a name alone where the source can be asked: a model counts as causal when
later tokens do not move earlier outputs of the source itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llmopt.bundle.manifest import ModelFacts, Port, Signature, SourceRecord
from llmopt.errors import UnknownNameError, UnsupportedModelError, UsageError
from llmopt.frontend.dims import name_dims
from llmopt.frontend.examples import role_of
from llmopt.frontend.reference import Reference
from llmopt.frontend.source import Source, SourceOptions
from llmopt.frontend.tables import longest
from llmopt.ir import graph as g
from llmopt.ir.feeds import Case, feeds
from llmopt.ir.program import Facts, Program, Role

TASKS: Final = ("generate", "embed", "encode", "raw")
UNBOUNDED: Final = 512  # tokens, of a model that shows no limit
_OUTPUTS: Final[Mapping[str, Role]] = {
    "logits": Role.LOGITS,
    "last_hidden_state": Role.HIDDEN,
    "sentence_embedding": Role.EMBEDDING,
}


@dataclass(frozen=True)
class Found:
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


def finish(found: Found, options: SourceOptions) -> Source:
    """Return the source of a graph: roles, dimensions, task and limits found out.

    Raises:
        UnknownNameError: there is no such task.
        UsageError: the model is not for the task that was asked for.
    """
    if options.task not in (None, *TASKS):
        raise UnknownNameError("task", str(options.task), TASKS)
    graph = found.model.graph
    inputs = _inputs(graph)
    name_dims(graph, {port.name: port.shape for port in inputs})
    inputs = tuple(_resized(port, graph.inputs[i]) for i, port in enumerate(inputs))
    labels = _labels(found.outputs, len(graph.outputs), found.family)
    table = _token_table(graph, inputs)
    drafted = Signature(
        inputs, tuple(_port(v, n) for v, n in zip(graph.outputs, labels, strict=True))
    )
    program = Program(found.model, drafted, Facts())
    main = _main_output(drafted)
    vocabulary, hidden = table or (0, 0)
    limit = min(
        filter(None, (found.limit, longest(program, vocabulary), options.max_length)),
        default=UNBOUNDED,
    )
    heads_tokens = main is not None and bool(inputs) and drafted.find(Role.TOKENS) is not None
    causal = heads_tokens and is_causal(
        found.reference(labels), drafted, labels.index(str(main)), vocabulary, min(limit, 7)
    )
    outputs = _outputs(drafted, main, found.outputs, vocabulary, hidden, causal=causal)
    _rename(graph, outputs)
    program.signature = Signature(inputs, outputs)
    task = _task(program.signature, options.task, causal=causal)
    logits = program.signature.find(Role.LOGITS)
    model = ModelFacts(
        family=found.family,
        layers=found.expected.get("attention", 0),
        hidden=hidden,
        vocabulary=_width(logits) or vocabulary,
        max_length=limit,
        pooling="mean" if task == "embed" and not program.signature.find(Role.EMBEDDING) else None,
    )
    program.learn(task=task, model=model, source=found.record, expected=dict(found.expected))
    reference = found.reference([port.name for port in outputs])
    return Source(found.record.name, program, reference, found.notes)


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


def _resized(port: Port, value: ir.Value) -> Port:
    """Return ``port`` with the dimensions that its value has now that they are named."""
    return Port(port.name, port.role, port.dtype, tuple(g.shape(value) or port.shape))


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


def is_causal(
    reference: Reference, signature: Signature, output: int, vocabulary: int, tokens: int
) -> bool:
    """Whether no token moves an output before it, and each moves its own: asked of the source."""
    if tokens < 2:
        return False
    name = signature.outputs[output].name
    ids = next(p.name for p in signature.inputs if p.role == Role.TOKENS)
    base = feeds(signature, Case(batch=2, new=tokens), vocabulary or 2)
    places = sorted({tokens - 1, tokens // 2})
    changed = []
    for place in places:
        moved = base[ids].copy()
        moved[:, place] = (moved[:, place] + 1) % (vocabulary or 2)
        changed.append({**base, ids: moved})
    first, *rest = [found[name] for found in reference.run([base, *changed])]
    return all(_only_from(first, other, place) for place, other in zip(places, rest, strict=True))


def _only_from(before: npt.NDArray[Any], after: npt.NDArray[Any], place: int) -> bool:
    if before.ndim != 3 or before.shape[1] <= place:
        return False
    moved = np.abs(after.astype(np.float64) - before).max(axis=(0, 2))
    quiet = 1e-6 * np.abs(before).max()
    return bool(np.all(moved[:place] <= quiet) and moved[place] > quiet)


def _outputs(  # noqa: PLR0913: what an output means depends on all of these
    signature: Signature,
    main: str | None,
    given: Sequence[str],
    vocabulary: int,
    hidden: int,
    *,
    causal: bool,
) -> tuple[Port, ...]:
    ports = []
    for port, label in zip(signature.outputs, given, strict=True):
        role, name = _OUTPUTS.get(label, Role.OTHER), port.name
        if port.name == main and role is Role.OTHER:
            scores = _width(port) == vocabulary or (causal and _width(port) != hidden)
            role = Role.LOGITS if scores else Role.HIDDEN
        if not label and role is not Role.OTHER:
            name = "logits" if role is Role.LOGITS else "last_hidden_state"
        ports.append(Port(name, role, port.dtype, port.shape))
    return tuple(ports)


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
