"""Give every Attention the dialect's form: operands, cache, heads and mask in one way.

Rewrites, for an Attention on [B, H, S, D], however it came to be::

    K = Concat(past, k), shown as present        into    past_key in, present_key out
    K = Reshape(Expand(Unsqueeze(k)))            into    k with its own number of heads
    a mask that is causal, padding or a window   into    is_causal, window, [B, 1, 1, T] mask
    Q, K, V of rank 4                            into    [B, S, H * D] and head counts
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import onnx_ir as ir
from typing_extensions import override

from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir.program import Program
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
            obstacle = _obstacle(node)
            if obstacle:
                outcome.miss(node, obstacle, "attention")
                continue
            _raise(program, node, meanings, outcome)
            outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


@dataclass(frozen=True)
class Operands:
    """What an Attention reads, the cache apart.

    Args:
        q: [B, H, S, D].
        k: New keys, [B, G, S, D].
        v: New values, [B, G, S, D].
        past: Past keys and values, if there is a cache.
        shown: What presents them now, to be replaced by the operator's own outputs.
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    past: tuple[ir.Value, ir.Value] | None = None
    shown: tuple[ir.Value, ir.Value] | None = None

    @property
    def aligned(self) -> bool:
        """Whether the last query stands at the last key, as a causal mask counts."""
        q, k = g.shape(self.q), g.shape(self.k)
        return self.past is not None or (q is not None and k is not None and q[2] == k[2])


def _obstacle(node: ir.Node) -> str | None:
    for index, label in ((0, "Q"), (1, "K"), (2, "V")):
        value = node.inputs[index]
        if g.rank(value) != 4 or g.static(value, 1) is None or g.static(value, 3) is None:
            return f"heads or width of {label} are not known: {g.shape(value)}"
    if g.optional(node, 6) is not None:
        return "it takes the lengths of padded keys"
    if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
        return "its scores are read"
    heads, groups = g.static(node.inputs[0], 1), g.static(node.inputs[1], 1)
    if heads is None or not groups or heads % groups:
        return f"{heads} query heads cannot share {groups} key heads"
    return None


def _operands(program: Program, node: ir.Node) -> Operands:
    q, k, v = (g.operand(node, i) for i in range(3))
    if (past_k := g.optional(node, 4)) is not None:
        shown = (node.outputs[1], node.outputs[2])
        return Operands(q, k, v, (past_k, g.operand(node, 5)), shown)
    grouped = unrepeated(k), unrepeated(v)
    if g.static(grouped[0], 1) == g.static(grouped[1], 1):
        k, v = grouped
    cache = _past(program, k), _past(program, v)
    # torch aligns a causal attention top-left, Attention with a past bottom-right
    if cache[0] is None or cache[1] is None or _placed(node):
        return Operands(q, k, v)
    (past_k, new_k), (past_v, new_v) = cache[0], cache[1]
    return Operands(q, new_k, new_v, (past_k, past_v), (k, v))


def _placed(node: ir.Node) -> bool:
    """Whether attributes, and not its mask alone, say where the queries stand."""
    windows = any(g.attribute(node, name, -1) >= 0 for name in _WINDOWS)
    return windows or bool(g.attribute(node, "is_causal", 0))


_WINDOWS: Final = ("left_window_size", "right_window_size")
_PLACED: Final = ("is_causal", *_WINDOWS)


def _raise(
    program: Program, node: ir.Node, meanings: dict[ir.Value, Meaning | str], outcome: Outcome
) -> None:
    of = _operands(program, node)
    attributes: dict[str, Any] = {
        name: attr.value for name, attr in node.attributes.items() if name in _KEPT
    }
    attributes |= {
        "q_num_heads": g.static(of.q, 1),
        "kv_num_heads": g.static(of.k, 1),
        "scale": g.attribute(node, "scale", None) or float(g.static(of.q, 3) or 1) ** -0.5,
    }
    meaning = _meaning(program, node, of, meanings)
    if isinstance(meaning, str):
        outcome.miss(node, f"its mask stays explicit: {meaning}", "mask")
        mask = g.optional(node, 3)
    else:
        attributes |= _placement(node, meaning)
        mask = padding_mask(program) if meaning.padding else None
    build = g.Builder(node)
    inputs: list[ir.Value | None] = [tokens_first(build, x) for x in (of.q, of.k, of.v)]
    inputs.append(mask)
    if of.past is None or of.shown is None:
        out = build.op("Attention", inputs, attributes, name=node.name)
    else:
        inputs.extend(of.past)
        out, *present = build.ops("Attention", inputs, attributes, outputs=3, name=node.name)
        for old, new in zip(of.shown, present, strict=True):
            g.replace_output(old, new)
    heads_out = tokens_last(build, out, of.q, g.static(of.v, 3) or 0)
    g.replace(node.outputs[0], heads_out)


_KEPT: Final = ("softcap", "softmax_precision", *_PLACED)


def _meaning(
    program: Program, node: ir.Node, of: Operands, meanings: dict[ir.Value, Meaning | str]
) -> Meaning | str:
    """Return what the mask means, or why it must stay explicit."""
    mask = g.optional(node, 3)
    if mask is None:
        return Meaning()
    if mask not in meanings:
        meanings[mask] = understand(program, mask)
    meaning = meanings[mask]
    if isinstance(meaning, Meaning) and meaning.placed and not of.aligned:
        return "it has other keys than queries, and no cache that says where the queries stand"
    return meaning


def _placement(node: ir.Node, meaning: Meaning) -> dict[str, int]:
    """Return what is causal and the windows, of the node and its mask together."""
    attributes = {"is_causal": 1} if meaning.causal else {}
    for name, size in zip(_WINDOWS, (meaning.left, meaning.right), strict=True):
        bounds = [n for n in (size, g.attribute(node, name, -1)) if n >= 0]
        if bounds:
            attributes[name] = min(bounds)
    return attributes


def _past(program: Program, value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Return (past, new) if ``value`` is a cache input with new tokens behind it, and is shown."""
    concat = g.producer(value, "Concat")
    if concat is None or len(concat.inputs) != 2 or g.attribute(concat, "axis", 0) not in (2, -2):
        return None
    past, new = g.operand(concat, 0), g.operand(concat, 1)
    caches = {port.name for port in program.signature.pasts}
    return (past, new) if past.name in caches and value.is_graph_output() else None


def unrepeated(value: ir.Value) -> ir.Value:
    """Return keys or values before each head was repeated for its group of queries."""
    reshape = g.producer(value, "Reshape")
    expand = g.producer(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = g.producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if unsqueeze is None or g.ints(unsqueeze.inputs[1]) not in ([2], [-3]):
        return value
    source = g.operand(unsqueeze, 0)
    sizes, before = g.shape(value), g.shape(source)
    if sizes is None or before is None or len(before) != 4 or sizes[3] != before[3]:
        return value
    return source


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
