"""Give every Attention the dialect's form: operands, cache, heads and mask in one way.

Rewrites, for an Attention on [B, H, S, D], however it came to be::

    K = Concat(past, k), shown as present        into    past_key in, present_key out
    K = Reshape(Expand(Unsqueeze(k)))            into    k with its own number of heads
    a mask that is causal, padding or a window   into    is_causal, window, [B, 1, 1, T] mask
    Q, K, V of rank 4                            into    [B, S, H * D] and head counts
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from typing_extensions import override

from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir import landmarks
from llmopt.ir.attention import UNBOUNDED, AttentionAttributes, AttentionOp, kept
from llmopt.ir.landmarks import Landmark
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.masks import Meaning, understand


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
            op = AttentionOp.of(node)
            if g.rank(op.q) != 4:
                continue
            obstacle = _obstacle(op)
            if obstacle:
                outcome.miss(node, obstacle, "attention")
                continue
            _raise(program, node, op, meanings, outcome)
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
        presents: Values that hold past and new ones now; the operator's outputs replace them.
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    past: tuple[ir.Value, ir.Value] | None = None
    presents: tuple[ir.Value, ir.Value] | None = None

    @property
    def aligned(self) -> bool:
        """Whether the last query stands at the last key, as a causal mask counts."""
        q, k = g.shape(self.q), g.shape(self.k)
        return self.past is not None or (q is not None and k is not None and q[2] == k[2])


def _obstacle(op: AttentionOp) -> str | None:
    for value, label in zip(op.qkv, "QKV", strict=True):
        if g.rank(value) != 4 or g.static(value, 1) is None or g.static(value, 3) is None:
            return f"heads or width of {label} are not known: {g.shape(value)}"
    if op.nonpad_kv_seqlen is not None:
        return "it takes the lengths of padded keys"
    if op.qk is not None and (op.qk.uses() or op.qk.is_graph_output()):
        return "its scores have a reader"
    heads, groups = g.static(op.q, 1), g.static(op.k, 1)
    if heads is None or not groups or heads % groups:
        return f"{heads} query heads cannot share {groups} key heads"
    return None


def _operands(program: Program, op: AttentionOp) -> Operands:
    q, k, v = op.qkv
    if op.past is not None:
        return Operands(q, k, v, op.past, op.presents)
    grouped = unrepeated(k), unrepeated(v)
    if g.static(grouped[0], 1) == g.static(grouped[1], 1):
        k, v = grouped
    cache = _past(program, k), _past(program, v)
    # torch aligns a causal attention top-left, Attention with a past bottom-right
    if cache[0] is None or cache[1] is None or op.placed:
        return Operands(q, k, v)
    (past_k, new_k), (past_v, new_v) = cache[0], cache[1]
    return Operands(q, new_k, new_v, (past_k, past_v), (k, v))


def _raise(
    program: Program,
    node: ir.Node,
    op: AttentionOp,
    meanings: dict[ir.Value, Meaning | str],
    outcome: Outcome,
) -> None:
    of = _operands(program, op)
    causal, window = False, (UNBOUNDED, UNBOUNDED)
    meaning = _meaning(program, op.mask, of, meanings)
    if isinstance(meaning, str):
        outcome.miss(node, f"its mask stays explicit: {meaning}", "mask")
        mask = op.mask
    else:
        causal, window = meaning.causal, _narrower(op.window, (meaning.left, meaning.right))
        mask = padding_mask(program) if meaning.padding else None
    raised = AttentionAttributes(
        heads=g.static(of.q, 1) or 0,
        groups=g.static(of.k, 1) or 0,
        scale=op.scaling(g.static(of.q, 3) or 1),
        causal=causal,
        window=window,
    )
    attributes = kept(node, "softcap", "precision", "causal", "window") | raised.written()
    build = g.Builder(node)
    inputs: list[ir.Value | None] = [tokens_first(build, x) for x in (of.q, of.k, of.v)]
    inputs.append(mask)
    if of.past is None or of.presents is None:
        out = build.op("Attention", inputs, attributes, name=node.name)
    else:
        inputs.extend(of.past)
        out, *present = build.ops("Attention", inputs, attributes, outputs=3, name=node.name)
        for old, new in zip(of.presents, present, strict=True):
            g.replace_output(old, new)
    heads_out = tokens_last(build, out, of.q, g.static(of.v, 3) or 0)
    g.replace(op.y, heads_out)


def _meaning(
    program: Program,
    mask: ir.Value | None,
    of: Operands,
    meanings: dict[ir.Value, Meaning | str],
) -> Meaning | str:
    """Return what the mask means, or why it must stay explicit."""
    if mask is None:
        return Meaning()
    if mask not in meanings:
        meanings[mask] = understand(program, mask)
    meaning = meanings[mask]
    if isinstance(meaning, Meaning) and meaning.placed and not of.aligned:
        return "it has other keys than queries, and no cache that says where the queries stand"
    return meaning


def _narrower(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    """Return the window of keys that are in both."""
    left, right = (
        min((size for size in sizes if size >= 0), default=UNBOUNDED)
        for sizes in zip(first, second, strict=True)
    )
    return left, right


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
    if (known := program.landmark(Landmark.PADDING_MASK)) is not None:
        return known
    given = program.input(Role.MASK)
    assert given is not None
    build = g.Builder(program.graph[0])
    present = build.op(
        "Cast", [given], {"to": int(ir.DataType.BOOL)}, like=given, dtype=ir.DataType.BOOL
    )
    axes = build.constant([1, 2], "int64")
    mask = landmarks.op(build, Landmark.PADDING_MASK, "Unsqueeze", [present, axes])
    sizes = g.shape(given) or ["B", "T"]
    mask.shape, mask.type = ir.Shape([sizes[0], 1, 1, sizes[1]]), present.type
    return mask


def tokens_first(build: g.Builder, x: ir.Value) -> ir.Value:
    """Return [B, H, S, D] as [B, S, H * D]."""
    sizes = g.shape(x)
    assert sizes is not None
    batch, heads, tokens, width = sizes
    turned = build.op(
        "Transpose", [x], {"perm": [0, 2, 1, 3]}, like=x, shape=[batch, tokens, heads, width]
    )
    assert isinstance(heads, int)
    assert isinstance(width, int)
    return build.op(
        "Reshape",
        [turned, build.constant([0, 0, heads * width], "int64")],
        like=x,
        shape=[batch, tokens, heads * width],
    )


def tokens_last(build: g.Builder, x: ir.Value, like: ir.Value, width: int) -> ir.Value:
    """Return [B, S, H * D] as [B, H, S, D], with the batch, heads and tokens of ``like``."""
    sizes = g.shape(like)
    assert sizes is not None
    batch, heads, tokens, _ = sizes
    assert isinstance(heads, int)
    x.shape, x.type = ir.Shape([batch, tokens, heads * width]), like.type
    split = build.op(
        "Reshape",
        [x, build.constant([0, 0, heads, width], "int64")],
        like=like,
        shape=[batch, tokens, heads, width],
    )
    return build.op(
        "Transpose", [split], {"perm": [0, 2, 1, 3]}, like=like, shape=[batch, heads, tokens, width]
    )
