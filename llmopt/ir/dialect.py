"""The canonical dialect: which operators a Program consists of, and what each must keep.

``docs/dialect.md`` states the same invariants for people; ``verify`` checks them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import onnx_ir as ir

from llmopt.ir.attention import AttentionOp
from llmopt.ir.graph import attribute, optional, rank, shape, static

OPSET: Final = 25
IR_VERSION: Final = 11


def verify(model: ir.Model) -> list[str]:
    """Return every way in which ``model`` is not a well-formed Program; nothing means it is.

    Checked: one opset, no vendor domain, no function left, topological order, outputs made.
    """
    return list(_malformed(model))


def invariants(model: ir.Model) -> list[str]:
    """Return every operator that breaks its invariant, which canonicalization establishes."""
    return [
        f"{node.op_type} {node.name!r}: {problem}"
        for node in model.graph
        for problem in INVARIANTS.get(node.op_type, _nothing)(node)
    ]


def _malformed(model: ir.Model) -> Iterator[str]:
    version = model.graph.opset_imports.get("")
    if version != OPSET:
        yield f"opset {version}, not {OPSET}"
    if model.functions:
        yield f"{len(model.functions)} functions that are not inlined"
    known = {*model.graph.inputs, *model.graph.initializers.values()}
    yield from _same_names(model.graph)
    for node in model.graph:
        label = f"{node.op_type} {node.name!r}"
        if node.domain != "":
            yield f"{label} is of domain {node.domain!r}"
        for value in node.inputs:
            if value is not None and value not in known:
                yield f"{label} reads {value.name!r} before it is made"
        known.update(node.outputs)
    for output in model.graph.outputs:
        if output not in known:
            yield f"output {output.name!r} is made by nothing"


def _same_names(graph: ir.Graph) -> Iterator[str]:
    """Yield the names that two values have: in a file they would be one."""
    made = (value for node in graph for value in node.outputs)
    values = dict.fromkeys((*graph.inputs, *graph.initializers.values(), *made))
    counts = Counter(value.name for value in values if value.name)
    yield from (f"{count} values are named {name!r}" for name, count in counts.items() if count > 1)


def _nothing(_: ir.Node) -> Iterator[str]:
    return iter(())


def _attention(node: ir.Node) -> Iterator[str]:
    """3-D operands with head counts; a cache is [B, G, T, D]; a causal mask only with reason."""
    op = AttentionOp.of(node)
    if rank(op.q) not in (None, 3) or rank(op.k) not in (None, 3):
        yield "Q and K must be [batch, tokens, heads * width]"
    if op.heads < 1 or op.groups < 1 or op.heads % op.groups:
        yield f"{op.heads} query heads cannot share {op.groups} key/value heads"
    if rank(op.past_key) not in (None, 4):
        yield "a cache must be [batch, heads, tokens, width]"
    if op.past_key is not None and (op.past_value is None or op.presents is None):
        yield "past key and value, present key and value go together"
    if op.causal and op.past_key is None and op.nonpad_kv_seqlen is None:
        s, t = shape(op.q), shape(op.k)
        if s and t and s[1] != t[1]:
            yield f"is_causal with {s[1]} queries on {t[1]} keys and no past aligns top-left"


def _rotary(node: ir.Node) -> Iterator[str]:
    """Tables are [positions, width / 2] with position_ids, or have the batch of x."""
    cos, sin, positions = optional(node, 1), optional(node, 2), optional(node, 3)
    if rank(optional(node, 0)) == 3 and not attribute(node, "num_heads", 0):
        yield "num_heads is needed for [batch, tokens, heads * width]"
    for table in (cos, sin):
        if positions is not None and rank(table) not in (None, 2):
            yield "with position_ids the tables must be [positions, width / 2]"
        x = shape(optional(node, 0))
        if positions is None and x and rank(table) == 3 and (s := shape(table)) and s[0] != x[0]:
            yield f"table of batch {s[0]} for x of batch {x[0]}"


def _norm(node: ir.Node) -> Iterator[str]:
    """The last axis only; the scale has one number per channel."""
    if attribute(node, "axis", -1) not in (-1, (rank(optional(node, 0)) or 0) - 1):
        yield "axis must be the last"
    x, scale = optional(node, 0), optional(node, 1)
    width = static(x, -1)
    if rank(scale) not in (None, 1) or (width and static(scale, 0) not in (None, width)):
        yield "the scale must have one number per channel"


INVARIANTS: Final[Mapping[str, Callable[[ir.Node], Iterator[str]]]] = {
    "Attention": _attention,
    "RotaryEmbedding": _rotary,
    "RMSNormalization": _norm,
    "LayerNormalization": _norm,
}
