"""What a decoder with a cache takes and gives, by the names that runners expect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import onnx_ir as ir

from llmopt.errors import NotIncrementalError
from llmopt.interface.signature import Port, Role, Signature
from llmopt.ir import graph as g
from llmopt.ir.attention import AttentionAttributes
from llmopt.ir.last_tokens import LOGITS_TO_KEEP, keep_last
from llmopt.ir.program import Program
from llmopt.passes.incremental.caches import Cache
from llmopt.passes.incremental.flow import BATCH, TOKENS, Flow
from llmopt.passes.incremental.reading import DecoderReading

NAMES: Final = {
    Role.TOKENS: "input_ids",
    Role.MASK: "attention_mask",
    Role.POSITIONS: "position_ids",
    Role.LOGITS: "logits",
}
_EACH_TOKEN: Final = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Cast", "Tanh", "Clip", "Identity", "MatMul"),
        *("LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax"),
    }
)
"""What the last tokens alone may go through: operators of one operand of tokens."""


def check_edge(program: Program) -> None:
    """Refuse inputs and outputs that a decoder with a cache cannot have.

    Raises:
        NotIncrementalError: naming one.
    """
    signature = program.signature
    for port in signature.inputs:
        if port.role not in NAMES:
            raise NotIncrementalError(port.name, "as an input it would need a past of its own")
    if signature.find(Role.TOKENS) is None:
        raise NotIncrementalError("inputs", "none of them is tokens")
    if [port.role for port in signature.outputs] != [Role.LOGITS]:
        odd = next((p.name for p in signature.outputs if p.role != Role.LOGITS), "outputs")
        raise NotIncrementalError(odd, "a decoder with a cache gives logits, and nothing else")


def check_logits(reading: DecoderReading) -> None:
    """Refuse logits that are not [batch, tokens, vocabulary].

    Raises:
        NotIncrementalError: they are not.
    """
    (logits,) = reading.program.graph.outputs
    flow = reading.flow(logits)
    if flow is None or len(flow.axes) != 3 or flow.axes[:2] != ((BATCH,), (TOKENS,)):
        held = "constant" if flow is None else flow.axes
        raise NotIncrementalError(
            str(logits.name), f"it is {held}, not [batch, tokens, vocabulary]"
        )


def cut_logits(reading: DecoderReading) -> None:
    """Let logits be those of the last ``logits_to_keep`` tokens, all for 0."""
    graph = reading.program.graph
    (logits, *_) = graph.outputs
    chain = _chain(reading, logits)
    value = g.operand(chain[-1], 0) if chain else logits
    last = keep_last(graph, value)
    if not chain:
        g.replace_output(logits, last)
        graph.outputs[0] = last
    else:
        chain[-1].replace_input_with(0, last)
    for each in (last, *(node.outputs[0] for node in chain)):
        dims = g.shape(each if each is not last else value) or []
        each.shape = ir.Shape([*dims[:1], "K", *dims[2:]])


def _chain(reading: DecoderReading, logits: ir.Value) -> list[ir.Node]:
    """Return the nodes from the logits up to the last value of every token that else is read."""
    chain: list[ir.Node] = []
    value = logits
    while (node := value.producer()) is not None and node.op_type in _EACH_TOKEN:
        flow = reading.flow(g.operand(node, 0))
        moving = reading.moving(node)
        if flow is None or len(moving) != 1 or flow.axes[:2] != ((BATCH,), (TOKENS,)):
            break
        if any(use.node is node for use in reading.uses) or len(node.outputs) > 1:
            break
        chain.append(node)
        value = g.operand(node, 0)
        if len(g.users(value)) > 1 or value.is_graph_output():
            break
    return chain


def sign(program: Program, caches: Sequence[Cache]) -> None:
    """Give inputs and outputs their names, and say what they mean."""
    graph, signature = program.graph, program.signature
    inputs = [_named(port) for port in signature.inputs]
    (logits,) = (_named(port) for port in signature.outputs)
    logits = replace(logits, shape=("B", "K", logits.shape[2]))
    mask = program.input(Role.MASK)
    if mask is not None:
        mask.shape = ir.Shape(["B", "T"])
    inputs = [replace(p, shape=("B", "T")) if p.role == Role.MASK else p for p in inputs]
    presents = tuple(cache.present for cache in caches)
    pasts = tuple(cache.past for cache in caches)
    renamed = {port.name: new.name for port, new in zip(signature.inputs, inputs, strict=True)}
    for value in graph.inputs:
        if (name := renamed.get(str(value.name), value.name)) != value.name:
            _rename(graph, value, str(name))
    _rename(graph, graph.outputs[0], logits.name)
    program.signature = Signature((*inputs, *pasts, LOGITS_TO_KEEP), (logits, *presents))


def _named(port: Port) -> Port:
    return replace(port, name=NAMES[Role(port.role)])


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    if value.name == name:
        return
    for node in graph:
        for other in node.outputs:
            if other.name == name:
                other.name = g.unused(graph, f"{name}_inner")
    value.name = name
    g.taken(graph).add(name)


def learn(program: Program, reading: DecoderReading, caches: Sequence[Cache]) -> None:
    """Note what a runner has to know of the caches."""
    groups, width = caches[0].sizes
    model = replace(
        program.facts.model,
        layers=reading.layers,
        heads=_heads(reading) or groups,
        kv_heads=groups,
        head_width=width,
        cache="concat",
    )
    program.learn(model=model)


def _heads(reading: DecoderReading) -> int:
    """Return how many query heads the first attention has, if it says so."""
    if not reading.fused:
        return 0
    q: Flow = reading.flows[g.operand(reading.fused[0].node, 0)]
    if len(q.axes) != 4:
        return AttentionAttributes.of(reading.fused[0].node).heads
    (heads,) = q.axes[1] or (1,)
    return heads if isinstance(heads, int) else 0
