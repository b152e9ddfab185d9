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
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.fuse_attention import FORBIDDEN
from llmopt.passes.masks import Meaning, understand

MICROSOFT: Final = "com.microsoft"
TURNED: Final = "rows/turned"
"""The node that says where `compact-rows` put each token."""


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
        bias: Whether GroupQueryAttention takes a bias. Where it does not, `compact-rows` has to
            have turned padded rows round.
    """

    name: ClassVar[str] = "lower-attention"
    lowers: ClassVar[bool] = True
    bias: bool = True

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in g.nodes(program.graph, "Attention"):
            cached = g.optional(node, 4) is not None
            reason = self._not_grouped(program, node) if cached else _not_multi_head(node)
            if reason is not None:
                outcome.miss(node, reason)
                continue
            if cached:
                _grouped(program, node, bias=self.bias)
            else:
                _multi_head(program, node)
            outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
            program.graph.sort()
        _remember_cache(program)
        return outcome

    def _not_grouped(self, program: Program, node: ir.Node) -> str | None:
        padded = g.optional(node, 3) is not None
        if padded and not self.bias and _named(program, TURNED) is None:
            return "GroupQueryAttention takes no mask here, and rows could not be turned round"
        return not_grouped(program, node, bias=self.bias)


def _remember_cache(program: Program) -> None:
    """Note whether past and present may be one buffer.

    They may where GroupQueryAttention writes them all, and a mask says how much is in use.
    """
    if not program.signature.has_cache:
        return
    names = {p.name for p in program.signature.outputs if p.role in _PRESENTS}
    presents = [value for value in program.graph.outputs if value.name in names]
    makers = [value.producer() for value in presents]
    grouped = all(node is not None and node.op_type == "GroupQueryAttention" for node in makers)
    shared = grouped and program.signature.find(Role.MASK) is not None
    program.learn(model=replace(program.facts.model, cache="shared" if shared else "concat"))


_PRESENTS: Final = (Role.PRESENT_KEY, Role.PRESENT_VALUE)


def not_grouped(program: Program, node: ir.Node, *, bias: bool = False) -> str | None:
    """Return why GroupQueryAttention would compute something else, or None.

    Args:
        program: Where it is.
        node: An Attention with a cache.
        bias: Whether GroupQueryAttention takes a bias.
    """
    mask = g.optional(node, 3)
    causal = bool(g.attribute(node, "is_causal", 0))
    if not causal and not (bias and _forbids_later(program, mask)):
        return "GroupQueryAttention is causal, this is not"
    if causal and mask is not None and mask is not _padding(program):
        return "its mask is not padding alone"
    widths = [g.static(node.inputs[i], -1) for i in range(3)]
    heads, groups = g.attribute(node, "q_num_heads", 1), g.attribute(node, "kv_num_heads", 1)
    if None in widths or widths[1] != widths[2] or widths[0] * groups != widths[1] * heads:
        return f"its Q, K and V are {widths} wide: GroupQueryAttention has one width for all"
    if g.attribute(node, "right_window_size", -1) >= 0:
        return "it has a window to the right"
    width = g.static(g.operand(node, 4), 3)
    if width is None or width % 16:
        return f"its heads are {width} wide, and GroupQueryAttention needs a multiple of 16"
    return None


def _not_multi_head(node: ir.Node) -> str | None:
    """Return why MultiHeadAttention would compute something else, or None."""
    if g.attribute(node, "q_num_heads", 0) != g.attribute(node, "kv_num_heads", 0):
        return "MultiHeadAttention has as many key heads as query heads"
    if g.attribute(node, "softcap", 0.0):
        return "MultiHeadAttention has no softcap"
    for side in ("left", "right"):
        if g.attribute(node, f"{side}_window_size", -1) >= 0:
            return "MultiHeadAttention has no window"
    return None


def _grouped(program: Program, node: ir.Node, *, bias: bool) -> None:
    build = g.Builder(node)
    q, k, v = (g.operand(node, i) for i in range(3))
    attributes: dict[str, Any] = {
        "num_heads": g.attribute(node, "q_num_heads", 0),
        "kv_num_heads": g.attribute(node, "kv_num_heads", 0),
        **_scale(node),
    }
    if softcap := g.attribute(node, "softcap", 0.0):
        attributes["softcap"] = softcap
    if (left := g.attribute(node, "left_window_size", -1)) >= 0:
        attributes["local_window_size"] = left + 1
    tables: list[ir.Value | None] = [None, None, None]
    turned = _rotary(q, k)
    if turned is not None:
        attributes["do_rotary"] = 1
        q, k, tables = turned
        tables[2] = _slots(program, tables[2]) if bias else None
    packed = _packed(q, k, v)
    qkv = [packed, None, None] if packed is not None else [q, k, v]
    last, total = _lengths(program)
    mask = g.optional(node, 3)
    added = mask
    if mask is not None and g.attribute(node, "is_causal", 0):
        added = _bias(program) if bias else None
    inputs = [*qkv, node.inputs[4], node.inputs[5], last, total, *tables, added]
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

    It may forbid more of them, padding or what is out of a window: it goes on as it is.
    """
    where = g.producer(mask, "Where")
    lowest = g.scalar(where.inputs[2]) if where is not None else None
    full = mask is not None and (g.shape(mask) or [])[2:] == ["S", "T"]
    if where is None or not full or lowest is None or lowest > FORBIDDEN:
        return False
    meaning = understand(program, g.operand(where, 0))
    return isinstance(meaning, Meaning) and meaning.causal


def _scale(node: ir.Node) -> dict[str, float]:
    """Return the scale where it is written; all three operators have the same default."""
    scale = g.attribute(node, "scale", None)
    return {} if scale is None else {"scale": scale}


def _rotary(q: ir.Value, k: ir.Value) -> tuple[ir.Value, ir.Value, list[ir.Value | None]] | None:
    """Return Q, K and the tables before rotation, if both are rotated by the same tables."""
    first, second = g.producer(q, "RotaryEmbedding"), g.producer(k, "RotaryEmbedding")
    if first is None or second is None or len(first.inputs) < 4:
        return None
    tables = list(first.inputs[1:4])
    if tables != list(second.inputs[1:4]) or g.attribute(first, "interleaved", 0):
        return None
    return g.operand(first, 0), g.operand(second, 0), tables


def _slots(program: Program, given: ir.Value | None) -> ir.Value | None:
    """Return position_ids [B, S] plus each row's padding on the left: where its keys are cached.

    GroupQueryAttention takes the positions of a first prompt as 0, 1, 2... whatever it is given
    (all it reads is the first element, as an offset for every row), but those of a later step as
    given. Rotary attention depends on differences alone, so positions may be counted from the
    first slot of the cache, if that is done at every step. Padding itself becomes 0.
    """
    mask = program.input(Role.MASK)
    if mask is None or given is None or given is not program.input(Role.POSITIONS):
        return given
    if (known := _named(program, "slots")) is not None:
        return known
    build = g.Builder(program.graph[0])
    padding = build.op("ArgMax", [mask], {"axis": 1, "keepdims": 1})
    slots = build.op("Add", [given, padding])
    count = build.op("Shape", [given], {"start": 1, "end": 2})
    end = build.constant([np.iinfo(np.int64).max], "int64")
    bounds = [build.op("Neg", [count]), end, build.constant([1], "int64")]
    real = build.op("Slice", [mask, *bounds])
    return build.op("Mul", [slots, real], name="slots")


def _packed(q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value | None:
    """Return [Q K V] in one value, if a Split made the three and nothing else."""
    split = g.producer(q, "Split")
    if split is None or list(split.outputs) != [q, k, v]:
        return None
    return g.operand(split, 0)


def _trimmed(inputs: list[ir.Value | None]) -> list[ir.Value | None]:
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs


def _named(program: Program, name: str) -> ir.Value | None:
    """Return the output of the prelude node of this name, if it was made already."""
    return next((n.outputs[0] for n in program.graph if n.name == name), None)


def _lengths(program: Program) -> tuple[ir.Value, ir.Value]:
    """Return the index of each row's last key [B] and the number of keys, both int32."""
    last, total = _named(program, "last_key"), _named(program, "total_keys")
    if last is not None and total is not None:
        return last, total
    build = g.Builder(program.graph[0])
    mask = program.input(Role.MASK)
    keys = mask if mask is not None else _keys_without_mask(program, build)
    count = build.op("Shape", [keys], {"start": 1, "end": 2})
    count32 = build.op("Cast", [count], {"to": int(ir.DataType.INT32)})
    total = build.op("Squeeze", [count32], name="total_keys")
    if mask is not None and _named(program, TURNED) is not None:
        return _last_real(build, mask), total
    batch = build.op("Shape", [keys], {"start": 0, "end": 1})
    less = build.op("Sub", [count32, build.constant([1], "int32")])
    last = build.op("Expand", [less, batch], name="last_key")
    return last, total


def _last_real(build: g.Builder, mask: ir.Value) -> ir.Value:
    """Return how many real tokens each row has, less one; a row of padding alone counts as one."""
    keys = build.op("ReduceSum", [mask, build.constant([1], "int64")], {"keepdims": 0})
    keys32 = build.op("Cast", [keys], {"to": int(ir.DataType.INT32)})
    last = build.op("Sub", [keys32, build.constant(1, "int32")])
    return build.op("Max", [last, build.constant(0, "int32")], name="last_key")


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
    known = _named(program, "padding_bias")
    if known is not None:
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
    return build.op("Expand", [square, sizes], name="padding_bias")


def _multi_head(program: Program, node: ir.Node) -> None:
    build = g.Builder(node)
    attributes: dict[str, Any] = {
        "num_heads": g.attribute(node, "q_num_heads", 0),
        **_scale(node),
    }
    if g.attribute(node, "is_causal", 0):
        attributes["unidirectional"] = 1
    padding, bias = _masks(program, node, build)
    pair = [_by_head(node.inputs[i]) for i in (1, 2)]
    # keys and values that come from elsewhere by head are taken as they are, if both do
    operands = [node.inputs[0], *(node.inputs[1:3] if None in pair else pair)]
    inputs = [*operands, None, padding, bias]
    out = build.op(
        "MultiHeadAttention", _trimmed(inputs), attributes, domain=MICROSOFT, name=node.name
    )
    g.replace(node.outputs[0], out)


def _by_head(value: ir.Value | None) -> ir.Value | None:
    """Return [B, H, T, D] where ``value`` [B, T, H * D] is made of it, and it is an input."""
    flat = g.producer(value, "Reshape")
    turned = g.producer(flat.inputs[0], "Transpose") if flat is not None else None
    if turned is None or list(g.attribute(turned, "perm", ())) != [0, 2, 1, 3]:
        return None
    source = g.operand(turned, 0)
    return source if source.is_graph_input() else None


def _masks(
    program: Program, node: ir.Node, build: g.Builder
) -> tuple[ir.Value | None, ir.Value | None]:
    """Return (key padding [B, T] int32, bias [B or 1, H or 1, S, T]) for what is masked."""
    mask = g.optional(node, 3)
    if mask is None:
        return None, None
    if mask.dtype != ir.DataType.BOOL:
        return None, _expanded(build, mask, node)
    given = program.input(Role.MASK)
    if given is not None and node.inputs[3] is _padding(program):
        known = _named(program, "key_padding")
        if known is None:
            first = g.Builder(program.graph[0])
            known = first.op("Cast", [given], {"to": int(ir.DataType.INT32)}, name="key_padding")
        return known, None
    low = build.constant(np.finfo(np.float32).min, "float32")
    bias = build.op("Where", [mask, build.constant(0.0, "float32"), low])
    bias.shape, bias.type = mask.shape, ir.TensorType(ir.DataType.FLOAT)
    return None, _expanded(build, bias, node)


def _expanded(build: g.Builder, bias: ir.Value, node: ir.Node) -> ir.Value:
    """Return ``bias`` as [B or 1, H or 1, S, T]: MultiHeadAttention repeats rows of no bias."""
    q, k = g.operand(node, 0), g.operand(node, 1)
    sizes, s, t = g.shape(bias), g.shape(q), g.shape(k)
    if sizes and s and t and len(sizes) == 4 and sizes[2:] == [s[1], t[1]]:
        return bias
    new = build.op("Shape", [q], {"start": 1, "end": 2})
    keys = build.op("Shape", [k], {"start": 1, "end": 2})
    ones = build.constant([1, 1], "int64")
    target = build.op("Concat", [ones, new, keys], {"axis": 0})
    return build.op("Expand", [bias, target])


def _padding(program: Program) -> ir.Value | None:
    from llmopt.passes.raise_attention import PADDING_MASK

    return _named(program, PADDING_MASK)
