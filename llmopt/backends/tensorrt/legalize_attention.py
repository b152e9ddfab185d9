"""Give every Attention the form that TensorRT's parser imports as one layer.

Rewrites::

    Attention(q, k, v, padding, past_key, past_value)       is_causal, windows
        into  keys = TensorScatter(past_key, k, write_indices)      [B, G, C, D], in place
              values = TensorScatter(past_value, v, write_indices)
              Attention(q, keys, values, mask)                      [B, H, S, D]

with one boolean mask [B, 1, S, C] for all layers of equal visibility. The parser reads neither
``nonpad_kv_seqlen`` nor windows nor ``softcap``, and aligns ``is_causal`` at the top left, which is
wrong with a cache: the mask of an attention is therefore always explicit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import onnx_ir as ir
from typing_extensions import override

from llmopt.backends.tensorrt.written_out import LOW, written_out
from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir.attention import UNBOUNDED, AttentionAttributes, AttentionOp, kept
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass

NO_SOFTCAP: Final = "TensorRT's attention has no softcap: it is products and a softmax"
_DECLINED: Final = "llmopt.tensorrt.declined"
_PASTS: Final = (Role.PAST_KEY, Role.PAST_VALUE)
_CACHES: Final = (*_PASTS, Role.PRESENT_KEY, Role.PRESENT_VALUE)


@dataclass(frozen=True)
class LegalizeAttention(Pass):
    """Write out masks, and let a cache be a buffer of fixed capacity that is updated in place.

    Numerics: exact on unpadded queries.
    Scope: the graph. The cache becomes [B, G, C, D] for C the most tokens of a sequence,
    ``attention_mask`` [B, C], and ``write_indices`` [B] says where each row's new tokens go.
    Leaves: nothing; an attention with ``softcap`` is written out as products and a softmax, and
    reported: TensorRT does not fuse it.
    """

    name: ClassVar[str] = "legalize-attention"
    lowers: ClassVar[bool] = True
    changes_signature: ClassVar[bool] = True

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        nodes = g.nodes(program.graph, "Attention")
        if not nodes:
            return outcome
        cached = program.signature.has_cache
        writes = _fix_capacity(program) if cached else None
        legalizer = _Legalizer(program, writes, outcome)
        for node in nodes:
            legalizer.rewrite(node)
        g.remove_dead(program.model)
        program.graph.sort()
        if cached:
            program.learn(model=replace(program.facts.model, cache="shared"))
        return outcome


def declined(program: Program) -> dict[str, str]:
    """Return the attentions that were written out, and why."""
    reasons: dict[str, str] = program.model.meta.setdefault(_DECLINED, {})
    return reasons


def _fix_capacity(program: Program) -> ir.Value:
    """Give the signature a cache of fixed capacity; return the new input ``write_indices``."""
    capacity, graph = program.facts.max_length, program.graph
    writes = ir.Value(
        name=Role.WRITE_INDICES, shape=ir.Shape(["B"]), type=ir.TensorType(ir.DataType.INT64)
    )
    signature = program.signature
    inputs = [_fixed(port, capacity) for port in signature.inputs]
    shapes = {port.name: port.shape for port in inputs}
    for value in graph.inputs:
        if str(value.name) in shapes:
            value.shape = ir.Shape(shapes[str(value.name)])
    index = next(i for i, port in enumerate(inputs) if port.role in _PASTS)
    graph.inputs.insert(index, writes)
    port = type(inputs[0])(Role.WRITE_INDICES, Role.WRITE_INDICES, "int64", ("B",))
    inputs.insert(index, port)
    outputs = [_fixed(port, capacity) for port in signature.outputs]
    program.signature = replace(signature, inputs=tuple(inputs), outputs=tuple(outputs))
    return writes


def _fixed(port: Any, capacity: int) -> Any:
    if port.role == Role.MASK:
        return replace(port, shape=(port.shape[0], capacity))
    if port.role in _CACHES:
        return replace(port, shape=(*port.shape[:2], capacity, port.shape[3]))
    return port


@dataclass(frozen=True)
class _Visibility:
    """The keys that an attention may see, the same for all layers that share a mask."""

    causal: bool = False
    window: tuple[int, int] = (UNBOUNDED, UNBOUNDED)
    mask: ir.Value | None = None


@dataclass
class _Legalizer:
    """The rewriting of one Program's attentions to TensorRT's form.

    Args:
        program: Program to edit.
        writes: ``write_indices`` [B] if there is a cache.
        outcome: Hits and misses of the pass.
    """

    program: Program
    writes: ir.Value | None
    outcome: Outcome
    masks: dict[_Visibility, ir.Value] = field(default_factory=dict)

    def rewrite(self, node: ir.Node) -> None:
        """Replace one Attention."""
        build, op = g.Builder(node), AttentionOp.of(node)
        counts = (op.heads, op.groups, op.groups)
        q, k, v = (_split_heads(build, x, n) for x, n in zip(op.qkv, counts, strict=True))
        if op.past is not None and op.presents is not None:
            pairs = zip(op.past, op.presents, (k, v), strict=True)
            k, v = (self._scatter(build, f"{node.name}/update", *each) for each in pairs)
        causal, mask = self._masked(build, op, (q, k))
        if op.softcap:
            self.outcome.miss(node, NO_SOFTCAP, "attention")
            declined(self.program)[str(node.name)] = NO_SOFTCAP
            width = g.static(q, 3)
            assert width is not None
            out = written_out(build, (q, k, v), mask, op.scaling(width), op.softcap)
        else:
            attributes = AttentionAttributes(causal=causal).written() | kept(node, "scale")
            inputs = [q, k, v] + ([mask] if mask is not None else [])
            out = build.op("Attention", inputs, attributes, name=node.name)
        out.shape, out.type = q.shape, q.type
        g.replace(op.y, _join_heads(build, out))
        self.outcome.hit()

    def _scatter(
        self, build: g.Builder, name: str, past: ir.Value, present: ir.Value, new: ir.Value
    ) -> ir.Value:
        """Write new keys or values into the cache; the result becomes the present."""
        inputs = [past, new, self.writes]
        # the parser supports the axis counted from the end alone
        attributes = {"axis": -2, "mode": "linear"}
        written = build.op("TensorScatter", inputs, attributes, name=name, like=past)
        if present.is_graph_output():
            g.replace_output(present, written)
        return written

    def _masked(
        self, build: g.Builder, op: AttentionOp, qk: tuple[ir.Value, ir.Value]
    ) -> tuple[bool, ir.Value | None]:
        """Return the attribute ``is_causal``, and the mask for everything else."""
        if self.writes is None and not op.placed:
            return False, op.mask
        seen = _Visibility(op.causal, op.window, op.mask)
        if self.writes is None and seen == _Visibility(causal=True):
            return True, None
        if seen not in self.masks:
            self.masks[seen] = self._mask(build, seen, *qk)
        return False, self.masks[seen]

    def _mask(self, build: g.Builder, seen: _Visibility, q: ir.Value, k: ir.Value) -> ir.Value:
        """Return the mask [B or 1, 1, S, C], boolean or additive as the model's own."""
        slots, keys = self._slots(build, q), _keys(build, k)
        left, right = seen.window
        bounds: list[ir.Value] = []
        if seen.causal:
            bounds.append(build.op("LessOrEqual", [keys, slots]))
        elif self.writes is not None:  # no slot beyond the last token
            count = build.op("Squeeze", [build.op("Shape", [q], {"start": 2, "end": 3})])
            start = build.op("Unsqueeze", [self.writes, build.constant([1, 2, 3], "int64")])
            bounds.append(build.op("Less", [keys, build.op("Add", [start, count])]))
        if left >= 0:
            oldest = build.op("Sub", [slots, build.constant(left, "int64")])
            bounds.append(build.op("GreaterOrEqual", [keys, oldest]))
        if right >= 0 and not seen.causal:
            newest = build.op("Add", [slots, build.constant(right, "int64")])
            bounds.append(build.op("LessOrEqual", [keys, newest]))
        if seen.mask is not None and not _is_added(seen.mask):
            bounds.append(seen.mask)
        allowed = bounds[0]
        for bound in bounds[1:]:
            allowed = build.op("And", [allowed, bound])
        if seen.mask is not None and seen.mask.dtype is not None and _is_added(seen.mask):
            low = build.constant(LOW, seen.mask.dtype.numpy())
            allowed = build.op("Where", [allowed, seen.mask, low])
            allowed.type = seen.mask.type
        return allowed

    def _slots(self, build: g.Builder, q: ir.Value) -> ir.Value:
        """Return the index of each query among the keys, [B or 1, 1, S, 1] int64."""
        zero, one = build.constant(0, "int64"), build.constant(1, "int64")
        count = build.op("Squeeze", [build.op("Shape", [q], {"start": 2, "end": 3})])
        rows = build.op("Range", [zero, count, one])
        rows = build.op("Unsqueeze", [rows, build.constant([0, 1, 3], "int64")])
        if self.writes is None:
            return rows
        start = build.op("Unsqueeze", [self.writes, build.constant([1, 2, 3], "int64")])
        return build.op("Add", [start, rows])


def _is_added(mask: ir.Value) -> bool:
    """Whether a mask is added to scores, and not boolean."""
    return mask.dtype is not None and mask.dtype.is_floating_point()


def _keys(build: g.Builder, k: ir.Value) -> ir.Value:
    """Return the index of each key, [1, 1, 1, C] int64."""
    zero, one = build.constant(0, "int64"), build.constant(1, "int64")
    count = build.op("Squeeze", [build.op("Shape", [k], {"start": 2, "end": 3})])
    keys = build.op("Range", [zero, count, one])
    return build.op("Unsqueeze", [keys, build.constant([0, 1, 2], "int64")])


def _split_heads(build: g.Builder, x: ir.Value, heads: int) -> ir.Value:
    """Return ``x`` [B, S, H * D] as [B, H, S, D]; a rotation moves behind the transpose."""
    rotary = g.producer(x, "RotaryEmbedding")
    if rotary is None or g.rank(rotary.inputs[0]) == 4 or g.sole_user(x) is None:
        return _transposed(build, x, heads)
    inner = _transposed(g.Builder(rotary), g.operand(rotary, 0), heads)
    attributes = {
        name: g.attribute(rotary, name, 0)
        for name in ("interleaved", "rotary_embedding_dim")
        if name in rotary.attributes
    }
    inputs = [inner, *rotary.inputs[1:]]
    return g.Builder(rotary).op("RotaryEmbedding", inputs, attributes, name=rotary.name, like=inner)


def _transposed(build: g.Builder, x: ir.Value, heads: int) -> ir.Value:
    sizes: Sequence[Any] = g.shape(x) or ["B", "S", "?"]
    width = sizes[2] // heads if isinstance(sizes[2], int) else -1
    split = build.op("Reshape", [x, build.constant([0, 0, heads, width], "int64")])
    shape = [sizes[0], heads, sizes[1], width if width > 0 else None]
    return build.op("Transpose", [split], {"perm": [0, 2, 1, 3]}, like=x, shape=shape)


def _join_heads(build: g.Builder, x: ir.Value) -> ir.Value:
    """Return ``x`` [B, H, S, D] as [B, S, H * D]."""
    turned = build.op("Transpose", [x], {"perm": [0, 2, 1, 3]})
    return build.op("Reshape", [turned, build.constant([0, 0, -1], "int64")])
