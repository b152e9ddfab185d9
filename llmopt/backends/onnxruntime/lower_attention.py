"""Lower Attention to ONNX Runtime's fused attention operators.

Rewrites::

    RotaryEmbedding on Q and K, causal Attention with a cache
        into  GroupQueryAttention, rotary inside, packed QKV, cache written in place
    Attention without a cache
        into  MultiHeadAttention
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir import landmarks
from llmopt.ir.attention import AttentionOp
from llmopt.ir.landmarks import Landmark
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.fuse_attention import FORBIDDEN
from llmopt.passes.masks import Meaning, understand

MICROSOFT: Final = "com.microsoft"


@dataclass(frozen=True)
class LowerAttention(Pass):
    """Lower Attention to GroupQueryAttention or MultiHeadAttention.

    A batch may be padded on either side: padding is an additive bias, positions are explicit and
    every row's length is the full one, because GroupQueryAttention takes per-row lengths as
    right padding.

    Numerics: within 1e-5 relative in float32.
    Scope: the graph. Leaves: Attention as the standard operator, which ONNX Runtime also runs,
    where no fused one does the same; the cache is then concatenated, not written in place.

    Args:
        bias: Whether GroupQueryAttention takes a bias. Without one, `compact-rows` must have moved
            left padding behind the tokens.
    """

    name: ClassVar[str] = "lower-attention"
    lowers: ClassVar[bool] = True
    bias: bool = True

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in g.nodes(program.graph, "Attention"):
            op = AttentionOp.of(node)
            cached = op.past is not None
            reason = self._not_grouped(program, op) if cached else _not_multi_head(op)
            if reason is not None:
                outcome.miss(node, reason)
                continue
            if cached:
                _grouped(program, node, op, bias=self.bias)
            else:
                _multi_head(program, node, op)
            outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
            program.graph.sort()
        _remember_cache(program)
        return outcome

    def _not_grouped(self, program: Program, op: AttentionOp) -> str | None:
        ordered = program.landmark(Landmark.ROW_ORDER) is not None
        if op.mask is not None and not self.bias and not ordered:
            return "GroupQueryAttention takes no mask here, and left padding could not be moved"
        return not_grouped(program, op, bias=self.bias)


def _remember_cache(program: Program) -> None:
    """Note whether past and present may be one buffer.

    They may where GroupQueryAttention writes them all, and a mask gives the length in use.
    """
    if not program.signature.has_cache:
        return
    names = {p.name for p in program.signature.outputs if p.role in _PRESENTS}
    presents = [value for value in program.graph.outputs if value.name in names]
    producers = [value.producer() for value in presents]
    grouped = all(node is not None and node.op_type == "GroupQueryAttention" for node in producers)
    shared = grouped and program.signature.find(Role.MASK) is not None
    program.learn(model=replace(program.facts.model, cache="shared" if shared else "concat"))


_PRESENTS: Final = (Role.PRESENT_KEY, Role.PRESENT_VALUE)


def not_grouped(program: Program, op: AttentionOp, *, bias: bool = False) -> str | None:
    """Return why GroupQueryAttention would compute something else, or None.

    Args:
        program: Program that contains it.
        op: An Attention with a cache.
        bias: Whether GroupQueryAttention takes a bias.
    """
    if not op.causal and not (bias and _forbids_later(program, op.mask)):
        return "GroupQueryAttention is causal, this is not"
    if op.causal and op.mask is not None and op.mask is not _padding(program):
        return "its mask is not padding alone"
    widths = [g.static(value, -1) for value in op.qkv]
    q, k, v = widths
    if q is None or k is None or k != v or q * op.groups != k * op.heads:
        return f"its Q, K and V are {widths} wide: GroupQueryAttention needs one head width for all"
    if op.window[1] >= 0:
        return "it has a window to the right"
    width = g.static(op.past_key, 3)
    if width is None or width % 16:
        return f"its heads are {width} wide, and GroupQueryAttention needs a multiple of 16"
    return None


def _not_multi_head(op: AttentionOp) -> str | None:
    """Return why MultiHeadAttention would compute something else, or None."""
    if op.heads != op.groups:
        return "MultiHeadAttention needs as many key heads as query heads"
    if op.softcap:
        return "MultiHeadAttention has no softcap"
    return "MultiHeadAttention has no window" if op.windowed else None


def _grouped(program: Program, node: ir.Node, op: AttentionOp, *, bias: bool) -> None:
    build = g.Builder(node)
    q, k, v = op.qkv
    attributes: dict[str, Any] = {
        "num_heads": op.heads,
        "kv_num_heads": op.groups,
        **_scale(op),
    }
    if op.softcap:
        attributes["softcap"] = op.softcap
    if op.window[0] >= 0:
        attributes["local_window_size"] = op.window[0] + 1
    tables: list[ir.Value | None] = [None, None, None]
    unrotated = _rotary(q, k)
    if unrotated is not None:
        attributes["do_rotary"] = 1
        q, k, tables = unrotated
        tables[2] = _slots(program, tables[2]) if bias else None
    packed = _packed(q, k, v)
    qkv = [packed, None, None] if packed is not None else [q, k, v]
    last, total = _lengths(program)
    added = op.mask
    if op.mask is not None and op.causal:
        added = _bias(program) if bias else None
    inputs = [*qkv, op.past_key, op.past_value, last, total, *tables, added]
    outputs = build.ops(
        "GroupQueryAttention",
        _trimmed(inputs),
        attributes,
        outputs=3,
        domain=MICROSOFT,
        name=node.name,
    )
    for old, new in zip(node.outputs, outputs, strict=True):
        g.replace(old, new)


def _forbids_later(program: Program, mask: ir.Value | None) -> bool:
    """Whether a mask is a bias of full size where keys are not later than the query.

    It may also forbid padding, or keys outside a window: the operator takes it unchanged.
    """
    where = g.producer(mask, "Where")
    lowest = g.scalar(where.inputs[2]) if where is not None else None
    full = mask is not None and (g.shape(mask) or [])[2:] == ["S", "T"]
    if where is None or not full or lowest is None or lowest > FORBIDDEN:
        return False
    meaning = understand(program, g.operand(where, 0))
    return isinstance(meaning, Meaning) and meaning.causal


def _scale(op: AttentionOp) -> dict[str, float]:
    """Return the scale where the node sets one; all three operators have the same default."""
    return {} if op.scale is None else {"scale": op.scale}


def _rotary(q: ir.Value, k: ir.Value) -> tuple[ir.Value, ir.Value, list[ir.Value | None]] | None:
    """Return Q, K and the tables before rotation, if both are rotated by the same tables."""
    first, second = g.producer(q, "RotaryEmbedding"), g.producer(k, "RotaryEmbedding")
    if first is None or second is None or len(first.inputs) < 4:
        return None
    tables = list(first.inputs[1:4])
    if tables != list(second.inputs[1:4]) or g.attribute(first, "interleaved", 0):
        return None
    return g.operand(first, 0), g.operand(second, 0), tables


def _slots(program: Program, positions: ir.Value | None) -> ir.Value | None:
    """Return position_ids [B, S] plus each row's padding on the left: where its keys are cached.

    GroupQueryAttention takes the positions of a first prompt to be 0, 1, 2... (it reads only the
    first element, as an offset for every row), but reads all positions of a later step.
    Rotary attention depends on differences alone, so positions may be counted from the first slot
    of the cache, if that is done at every step. Padding itself becomes 0.
    """
    mask = program.input(Role.MASK)
    if mask is None or positions is None or positions is not program.input(Role.POSITIONS):
        return positions
    if (known := program.landmark(Landmark.SLOTS)) is not None:
        return known
    build = g.Builder(program.graph[0])
    padding = build.op("ArgMax", [mask], {"axis": 1, "keepdims": 1})
    slots = build.op("Add", [positions, padding])
    count = build.op("Shape", [positions], {"start": 1, "end": 2})
    end = build.constant([np.iinfo(np.int64).max], "int64")
    bounds = [build.op("Neg", [count]), end, build.constant([1], "int64")]
    real = build.op("Slice", [mask, *bounds])
    return landmarks.op(build, Landmark.SLOTS, "Mul", [slots, real])


def _packed(q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value | None:
    """Return [Q K V] in one value, if one Split has exactly these outputs."""
    split = g.producer(q, "Split")
    if split is None or list(split.outputs) != [q, k, v]:
        return None
    return g.operand(split, 0)


def _trimmed(inputs: list[ir.Value | None]) -> list[ir.Value | None]:
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs


def _lengths(program: Program) -> tuple[ir.Value, ir.Value]:
    """Return the index of each row's last key [B] and the number of keys, both int32."""
    last, total = map(program.landmark, (Landmark.LAST_KEY, Landmark.TOTAL_KEYS))
    if last is not None and total is not None:
        return last, total
    build = g.Builder(program.graph[0])
    mask = program.input(Role.MASK)
    keys = mask if mask is not None else _keys_without_mask(program, build)
    count = build.op("Shape", [keys], {"start": 1, "end": 2})
    count32 = build.op("Cast", [count], {"to": int(ir.DataType.INT32)})
    total = landmarks.op(build, Landmark.TOTAL_KEYS, "Squeeze", [count32])
    if mask is not None and program.landmark(Landmark.ROW_ORDER) is not None:
        return _last_real(build, mask), total
    batch = build.op("Shape", [keys], {"start": 0, "end": 1})
    less = build.op("Sub", [count32, build.constant([1], "int32")])
    return landmarks.op(build, Landmark.LAST_KEY, "Expand", [less, batch]), total


def _last_real(build: g.Builder, mask: ir.Value) -> ir.Value:
    """Return how many real tokens each row has, less one; a row of padding alone counts as one."""
    keys = build.op("ReduceSum", [mask, build.constant([1], "int64")], {"keepdims": 0})
    keys32 = build.op("Cast", [keys], {"to": int(ir.DataType.INT32)})
    last = build.op("Sub", [keys32, build.constant(1, "int32")])
    return landmarks.op(build, Landmark.LAST_KEY, "Max", [last, build.constant(0, "int32")])


def _keys_without_mask(program: Program, build: g.Builder) -> ir.Value:
    """Return a value [B, T] where the model has no mask: its past and its tokens together."""
    past, tokens = program.input(Role.PAST_KEY, 0), program.graph.inputs[0]
    assert past is not None
    batch = build.op("Shape", [tokens], {"start": 0, "end": 1})
    before = build.op("Shape", [past], {"start": 2, "end": 3})
    new = build.op("Shape", [tokens], {"start": 1, "end": 2})
    sizes = build.op("Concat", [batch, build.op("Add", [before, new])], {"axis": 0})
    return build.op("Expand", [build.constant(1, "int64"), sizes])


def _bias(program: Program) -> ir.Value:
    """Return the padding mask as a bias [B, 1, S, T] float32: 0, or the lowest number."""
    if (known := program.landmark(Landmark.PADDING_BIAS)) is not None:
        return known
    mask, tokens = program.input(Role.MASK), program.input(Role.TOKENS)
    assert mask is not None
    tokens = tokens if tokens is not None else program.graph.inputs[0]
    build = g.Builder(program.graph[0])
    present = build.op("Cast", [mask], {"to": int(ir.DataType.BOOL)})
    # the lowest finite number, not -inf: a row of padding alone must not become NaN
    low = build.constant(np.finfo(np.float32).min, "float32")
    row = build.op("Where", [present, build.constant(0.0, "float32"), low])
    square = build.op("Unsqueeze", [row, build.constant([1, 2], "int64")])
    new = build.op("Shape", [tokens], {"start": 1, "end": 2})
    ones = build.constant([1, 1], "int64")
    sizes = build.op("Concat", [ones, new, build.constant([1], "int64")], {"axis": 0})
    return landmarks.op(build, Landmark.PADDING_BIAS, "Expand", [square, sizes])


def _multi_head(program: Program, node: ir.Node, op: AttentionOp) -> None:
    build = g.Builder(node)
    attributes: dict[str, Any] = {"num_heads": op.heads, **_scale(op)}
    if op.causal:
        attributes["unidirectional"] = 1
    padding, bias = _masks(program, op, build)
    pair = [_by_head(value) for value in (op.k, op.v)]
    # keys and values that come from elsewhere by head are taken as they are, if both do
    operands = [op.q, *((op.k, op.v) if None in pair else pair)]
    inputs = [*operands, None, padding, bias]
    out = build.op(
        "MultiHeadAttention", _trimmed(inputs), attributes, domain=MICROSOFT, name=node.name
    )
    g.replace(op.y, out)


def _by_head(value: ir.Value | None) -> ir.Value | None:
    """Return the input [B, H, T, D] that is transposed and reshaped to ``value`` [B, T, H * D]."""
    flat = g.producer(value, "Reshape")
    transpose = g.producer(flat.inputs[0], "Transpose") if flat is not None else None
    if transpose is None or list(g.attribute(transpose, "perm", ())) != [0, 2, 1, 3]:
        return None
    source = g.operand(transpose, 0)
    return source if source.is_graph_input() else None


def _masks(
    program: Program, op: AttentionOp, build: g.Builder
) -> tuple[ir.Value | None, ir.Value | None]:
    """Return (key padding [B, T] int32, bias [B or 1, H or 1, S, T]) for what is masked."""
    mask = op.mask
    if mask is None:
        return None, None
    if mask.dtype != ir.DataType.BOOL:
        return None, _expanded(build, mask, op)
    port = program.input(Role.MASK)
    if port is not None and mask is _padding(program):
        known = program.landmark(Landmark.KEY_PADDING)
        if known is None:
            first, to = g.Builder(program.graph[0]), {"to": int(ir.DataType.INT32)}
            known = landmarks.op(first, Landmark.KEY_PADDING, "Cast", [port], to)
        return known, None
    low = build.constant(np.finfo(np.float32).min, "float32")
    bias = build.op(
        "Where", [mask, build.constant(0.0, "float32"), low], like=mask, dtype=ir.DataType.FLOAT
    )
    return None, _expanded(build, bias, op)


def _expanded(build: g.Builder, bias: ir.Value, op: AttentionOp) -> ir.Value:
    """Return ``bias`` as [B or 1, H or 1, S, T]: MultiHeadAttention does not broadcast S or T."""
    sizes, s, t = g.shape(bias), g.shape(op.q), g.shape(op.k)
    if sizes and s and t and len(sizes) == 4 and sizes[2:] == [s[1], t[1]]:
        return bias
    new = build.op("Shape", [op.q], {"start": 1, "end": 2})
    keys = build.op("Shape", [op.k], {"start": 1, "end": 2})
    ones = build.constant([1, 1], "int64")
    target = build.op("Concat", [ones, new, keys], {"axis": 0})
    return build.op("Expand", [bias, target])


def _padding(program: Program) -> ir.Value | None:
    return program.landmark(Landmark.PADDING_MASK)
