"""Give every Attention the dialect's form: operands, cache, heads and mask in one way.

Rewrites, for an Attention on [B, H, S, D], however it came to be::

    K = Concat(past, k), shown as present        into    past_key in, present_key out
    K = Reshape(Expand(Unsqueeze(k)))            into    k with its own number of heads
    a mask that is causal, padding or a window   into    is_causal, window, [B, 1, 1, T] mask
    Q, K, V of rank 4                            into    [B, S, H * D] and head counts
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir.program import Program, Role
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.masks import Meaning, understand

PADDING_MASK = "padding_mask"


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """Give Attention the form that the dialect documents.

    Numerics: exact on unpadded queries; a padded query may attend to other keys than before.
    Scope: the graph. Leaves: a mask with other values or of unknown origin, as an explicit
    mask; that is reported as a note, and is no miss: the attention is fused.
    """

    name: ClassVar[str] = "raise-attention"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        meanings: dict[ir.Value, Meaning | str] = {}
        for node in g.nodes(program.graph, "Attention"):
            if g.rank(node.inputs[0]) != 4:
                continue
            obstacle = _unknown_sizes(node)
            if obstacle:
                outcome.miss(node, obstacle, "attention")
                continue
            _raise(program, node, meanings, outcome)
            outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


def _unknown_sizes(node: ir.Node) -> str | None:
    for index, label in ((0, "Q"), (1, "K"), (2, "V")):
        value = node.inputs[index]
        if g.static(value, 1) is None or g.static(value, 3) is None:
            return f"heads or width of {label} are not known: {g.shape(value)}"
    return None


def _raise(
    program: Program, node: ir.Node, meanings: dict[ir.Value, Meaning | str], outcome: Outcome
) -> None:
    q, k, v = (g.operand(node, i) for i in range(3))
    k, v = unrepeated(k), unrepeated(v)
    past_k, past_v = _past(program, k), _past(program, v)
    attributes: dict[str, Any] = {
        "q_num_heads": g.static(q, 1),
        "kv_num_heads": g.static(k, 1),
        "scale": g.attribute(node, "scale", None) or float(g.static(q, 3) or 1) ** -0.5,
    }
    if softcap := g.attribute(node, "softcap", 0.0):
        attributes["softcap"] = softcap
    mask = _mask(program, node, attributes, meanings, outcome)
    build = g.Builder(node)
    if past_k is None or past_v is None:
        operands = [tokens_first(build, x) for x in (q, k, v)]
        inputs: list[ir.Value | None] = [*operands, mask]
        out = build.op("Attention", inputs, attributes, name=node.name)
    else:
        fresh = [tokens_first(build, x) for x in (q, past_k[1], past_v[1])]
        inputs = [*fresh, mask, past_k[0], past_v[0]]
        out, present_k, present_v = build.ops(
            "Attention", inputs, attributes, outputs=3, name=node.name
        )
        for old, new in ((k, present_k), (v, present_v)):
            g.replace(old, new)
    heads_out = tokens_last(build, out, q, g.static(v, 3) or 0)
    g.replace(node.outputs[0], heads_out)


def _past(program: Program, value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Return (past, new) if ``value`` is a cache input with new tokens behind it, and is shown."""
    concat = g.producer(value, "Concat")
    if concat is None or len(concat.inputs) != 2 or g.attribute(concat, "axis", 0) not in (2, -2):
        return None
    past, new = g.operand(concat, 0), g.operand(concat, 1)
    caches = {
        p.name
        for p in program.signature.inputs
        if p.role in (Role.PAST_KEY, Role.PAST_VALUE)
    }
    return (past, new) if past.name in caches and value.is_graph_output() else None


def unrepeated(value: ir.Value) -> ir.Value:
    """Return keys or values before each head was repeated for its group of queries."""
    reshape = g.producer(value, "Reshape")
    expand = g.producer(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = g.producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if unsqueeze is None or g.ints(unsqueeze.inputs[1]) != [2]:
        return value
    source = g.operand(unsqueeze, 0)
    sizes, before = g.shape(value), g.shape(source)
    if sizes is None or before is None or len(before) != 4 or sizes[3] != before[3]:
        return value
    return source


def _mask(
    program: Program,
    node: ir.Node,
    attributes: dict[str, Any],
    meanings: dict[ir.Value, Meaning | str],
    outcome: Outcome,
) -> ir.Value | None:
    """Set what the mask means as attributes and return what is left of it."""
    mask = g.optional(node, 3)
    if g.attribute(node, "is_causal", 0):
        attributes["is_causal"] = 1
    if mask is None:
        return None
    if mask not in meanings:
        meanings[mask] = understand(program, mask)
    meaning = meanings[mask]
    if isinstance(meaning, str):
        outcome.miss(node, f"its mask stays explicit: {meaning}", "mask")
        return mask
    if meaning.causal:
        attributes["is_causal"] = 1
    for name, size in (("left", meaning.left), ("right", meaning.right)):
        if size >= 0:
            attributes[f"{name}_window_size"] = size
    return padding_mask(program) if meaning.padding else None


def padding_mask(program: Program) -> ir.Value:
    """Return the one mask of padding, bool [B, 1, 1, T], made at the start of the graph."""
    for node in g.nodes(program.graph, "Unsqueeze"):
        if node.name == PADDING_MASK:
            return node.outputs[0]
    given = program.input(Role.MASK)
    assert given is not None
    build = g.Builder(program.graph[0])
    present = build.op("Cast", [given], {"to": int(ir.DataType.BOOL)})
    present.shape, present.type = given.shape, ir.TensorType(ir.DataType.BOOL)
    axes = build.constant([1, 2], "int64")
    mask = build.op("Unsqueeze", [present, axes], name=PADDING_MASK)
    sizes = g.shape(given) or ["B", "T"]
    mask.shape, mask.type = ir.Shape([sizes[0], 1, 1, sizes[1]]), present.type
    return mask


def tokens_first(build: g.Builder, x: ir.Value) -> ir.Value:
    """Return [B, H, S, D] as [B, S, H * D]."""
    sizes = g.shape(x)
    assert sizes is not None
    batch, heads, tokens, width = sizes
    turned = build.op("Transpose", [x], {"perm": [0, 2, 1, 3]})
    turned.shape, turned.type = ir.Shape([batch, tokens, heads, width]), x.type
    assert isinstance(heads, int)
    assert isinstance(width, int)
    flat = build.op("Reshape", [turned, build.constant([0, 0, heads * width], "int64")])
    flat.shape, flat.type = ir.Shape([batch, tokens, heads * width]), x.type
    return flat


def tokens_last(build: g.Builder, x: ir.Value, like: ir.Value, width: int) -> ir.Value:
    """Return [B, S, H * D] as [B, H, S, D], with the batch, heads and tokens of ``like``."""
    sizes = g.shape(like)
    assert sizes is not None
    batch, heads, tokens, _ = sizes
    assert isinstance(heads, int)
    x.shape, x.type = ir.Shape([batch, tokens, heads * width]), like.type
    split = build.op("Reshape", [x, build.constant([0, 0, heads, width], "int64")])
    split.shape, split.type = ir.Shape([batch, tokens, heads, width]), like.type
    turned = build.op("Transpose", [split], {"perm": [0, 2, 1, 3]})
    turned.shape, turned.type = ir.Shape([batch, heads, tokens, width]), like.type
    return turned
