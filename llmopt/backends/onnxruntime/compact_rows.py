"""Move left padding behind the tokens, inside the graph, for attention that counts its keys.

Rewrites, in front of the first layer and behind the last::

    input_ids     [0 0 a b c]    into    [a b c 0 0]
    position_ids  [0 0 0 1 2]    into    [0 1 2 0 0]
    hidden states [a b c . .]    into    [. . a b c]

The fast kernels of GroupQueryAttention on a GPU take no mask: they read the first keys of each
row, as many as its length says. A batch that is padded on the left is therefore compacted, row by
row, and the rows are restored before anything else reads them. A step of one token has nothing to
move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from llmopt.backends.onnxruntime.lower_attention import not_grouped
from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir import landmarks
from llmopt.ir.attention import AttentionOp
from llmopt.ir.landmarks import Landmark
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass

_EACH_NUMBER: Final = frozenset(
    {
        *("Abs", "Add", "Cast", "Clip", "Cos", "Div", "Erf", "Exp", "Gelu", "Identity", "Max"),
        *("Min", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Sin", "Sqrt", "Sub"),
        *("Swish", "Tanh", "Where"),
    }
)
_LAST_AXIS: Final = frozenset({"LayerNormalization", "MatMul", "RMSNormalization", "Split"})
"""Operators that mix the last axis alone, whichever of the others is that of tokens."""

Axes = dict[ir.Value, int]
"""The token axis of each value whose rows are compacted."""


@dataclass(frozen=True)
class CompactRows(Pass):
    """Move each row's left padding behind its tokens, and restore the order of its outputs.

    Numerics: exact on unpadded positions. Padding keeps its positions; its values may differ.
    Scope: decoders with a cache and a mask. Padding stands at either side of the tokens, not
    between them.
    Leaves: graphs where an operator other than attention mixes tokens.
    """

    name: ClassVar[str] = "compact-rows"
    lowers: ClassVar[bool] = True

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        mask, tokens = program.input(Role.MASK), program.input(Role.TOKENS)
        padded = _padded(program)
        if mask is None or tokens is None or not padded:
            return outcome
        if (unfit := _unfit(program, padded)) is not None:
            outcome.miss(*unfit)
            return outcome
        ports = [v for v in (tokens, *map(program.input, _PER_TOKEN_ROLES)) if v is not None]
        cuts, ends, obstacle = _readers(program, ports)
        if obstacle is not None:
            outcome.miss(*obstacle)
            return outcome
        anchor = program.graph[0]
        forth, back = _orders(g.Builder(anchor), mask, tokens)
        for value in ports:
            _compact(value, forth, anchor)
            outcome.hit()
        for node in cuts:
            hidden = g.operand(node, 0)
            node.replace_input_with(0, _restored(g.Builder(node), hidden, back))
        for out in ends:
            g.replace_output(out, _restored(g.Builder(program.graph), out, back))
        _on_the_host(program, tokens)
        return outcome


_PER_TOKEN_ROLES: Final = (Role.POSITIONS, Role.TOKEN_TYPES)


def _padded(program: Program) -> list[ir.Node]:
    """Return the attentions with a cache, if one of them has a mask and no row is compacted yet."""
    if program.landmark(Landmark.ROW_ORDER) is not None:
        return []
    cached = [n for n in g.nodes(program.graph, "Attention") if AttentionOp.of(n).past]
    return cached if any(AttentionOp.of(node).mask is not None for node in cached) else []


def _unfit(program: Program, padded: list[ir.Node]) -> tuple[ir.Node, str] | None:
    """Return the first attention that cannot read compacted rows, and why, if there is one."""
    for node in padded:
        if AttentionOp.of(node).mask is None:
            return node, "it attends to padding, other layers do not"
        if (reason := not_grouped(program, AttentionOp.of(node))) is not None:
            return node, reason
    return None


def _readers(
    program: Program, ports: list[ir.Value]
) -> tuple[list[ir.Node], list[ir.Value], tuple[ir.Node, str] | None]:
    """Return the readers of compacted rows: nodes that slice the last tokens, and outputs.

    The third is the node that may mix tokens, and how, if there is one.
    """
    axes: Axes = dict.fromkeys(ports, 1)
    cuts: list[ir.Node] = []
    for node in program.graph:
        if node.op_type == "Shape" or not any(value in axes for value in node.inputs):
            continue
        if axes.get(g.operand(node, 0)) == 1 and _slices_tokens(node):
            cuts.append(node)
            continue
        axis = _axis(node, axes)
        if isinstance(axis, str):
            return [], [], (node, axis)
        outputs = node.outputs[:1] if node.op_type == "Attention" else node.outputs
        axes |= dict.fromkeys(outputs, axis)
    return cuts, [out for out in program.graph.outputs if out in axes], None


def _slices_tokens(node: ir.Node) -> bool:
    return g.is_op(node, "Slice") and g.ints(g.optional(node, 3)) == [1]


def _axis(node: ir.Node, axes: Axes) -> int | str:
    """Return the token axis of the outputs of ``node``, or how it may mix tokens."""
    alone = f"{node.op_type} may mix tokens"
    others = [v for v in node.inputs if v is not None and v not in axes]
    read = {axes[v] for v in node.inputs if v in axes}
    if node.op_type == "RotaryEmbedding" and node.inputs[0] in axes:  # positions stay [B, S]
        return axes[g.operand(node, 0)]
    if len(read) > 1:
        return alone
    (axis,) = read
    if node.op_type in _EACH_NUMBER:
        same = all(_same_for_all_tokens(value) for value in others)
        return (
            axis if same else f"{node.op_type} combines tokens with values that differ by position"
        )
    if node.op_type == "Transpose":
        return list(g.attribute(node, "perm", [1, 0])).index(axis)
    fits = _PER_TOKEN.get(node.op_type)
    keeps = axis == 1 or (node.op_type in _LAST_AXIS and axis != (g.rank(node.inputs[0]) or 0) - 1)
    return axis if fits is not None and keeps and fits(node, others) else alone


def _by_matrix(node: ir.Node, others: list[ir.Value]) -> bool:
    return others == [node.inputs[1]] and g.rank(others[0]) == 2


def _by_row(node: ir.Node, others: list[ir.Value]) -> bool:
    return node.inputs[0] in others and g.attribute(node, "axis", 0) == 0


def _along_last_axis(node: ir.Node, _: list[ir.Value]) -> bool:
    return g.attribute(node, "axis", -1) in {-1, (g.rank(node.outputs[0]) or 0) - 1}


def _slices_last_axis(node: ir.Node, _: list[ir.Value]) -> bool:
    axes = g.ints(g.optional(node, 3))
    return axes in ([-1], [(g.rank(node.inputs[0]) or 0) - 1])


def _keeps_tokens(node: ir.Node, _: list[ir.Value]) -> bool:
    target = g.ints(node.inputs[1])
    return target is not None and target[:2] == [0, 0]


_PER_TOKEN: Final[Mapping[str, Callable[[ir.Node, list[ir.Value]], bool]]] = {
    "Attention": lambda node, _: AttentionOp.of(node).past is not None,
    "Concat": _along_last_axis,
    "Gather": _by_row,
    "LayerNormalization": lambda node, _: g.rank(node.inputs[0]) != 2,
    "MatMul": _by_matrix,
    "RMSNormalization": lambda node, _: g.rank(node.inputs[0]) != 2,
    "Reshape": _keeps_tokens,
    "Slice": _slices_last_axis,
    "Softmax": _along_last_axis,
    "Split": _along_last_axis,
}


def _same_for_all_tokens(value: ir.Value) -> bool:
    """Whether ``value`` is a constant that does not differ along [B, S, ...]'s second axis."""
    sizes = g.shape(value)
    fixed = value.is_initializer() or g.constant(value) is not None
    return fixed and sizes is not None and (len(sizes) < 2 or all(n == 1 for n in sizes[:-1]))


def _orders(build: g.Builder, mask: ir.Value, tokens: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the index [B, S] that compacts rows, and the index [B, S, 1] that restores them.

    All values are computed on the mask's device; only the sizes are computed on the host.
    """
    count = build.op("Shape", [tokens], {"start": 1, "end": 2})
    ends = build.constant([np.iinfo(np.int64).max], "int64")
    axis, along = build.constant([1], "int64"), build.constant(1, "int64")
    zero = build.constant(0, "int64")
    new = build.op("Slice", [mask, build.op("Neg", [count]), ends, axis])
    before_first = build.op("Equal", [build.op("CumSum", [new, along]), zero])
    padding = build.op("ReduceSum", [_integers(build, before_first), axis])
    ones = _integers(build, build.op("Equal", [new, new]))
    size = build.op("ReduceSum", [ones, axis])
    index = build.op("Sub", [build.op("CumSum", [ones, along]), along])
    order = [build.op("Add", [index, padding]), size]
    forth = landmarks.op(build, Landmark.ROW_ORDER, "Mod", order)
    back = build.op("Mod", [build.op("Sub", [index, padding]), size])
    last = build.constant([2], "int64")
    return forth, build.op("Unsqueeze", [back, last])


def _integers(build: g.Builder, value: ir.Value) -> ir.Value:
    return build.op("Cast", [value], {"to": int(ir.DataType.INT64)})


def _compact(value: ir.Value, forth: ir.Value, anchor: ir.Node) -> None:
    readers = [use for use in value.uses() if use.node.op_type != "Shape"]
    build = g.Builder(anchor)
    out = build.op(
        "GatherElements", [value, forth], {"axis": 1}, name=f"rows/{value.name}", like=value
    )
    for use in readers:
        use.node.replace_input_with(use.idx, out)


def _restored(build: g.Builder, rows: ir.Value, back: ir.Value) -> ir.Value:
    return build.op("GatherND", [rows, back], {"batch_dims": 1}, name="rows/back", like=rows)


def _on_the_host(program: Program, tokens: ir.Value) -> None:
    """Compute where the last tokens begin on the host: from sizes and ``logits_to_keep``.

    A provider of a device puts integer arithmetic of its own inputs on the device, and waits for
    the result where a Slice needs it; what is computed from a Shape stays on the host.
    """
    keep = program.input(Role.LOGITS_TO_KEEP)
    for node in g.nodes(program.graph, "Neg"):
        source = g.producer(node.inputs[0], "Reshape")
        if keep is not None and source is not None and source.inputs[0] is keep:
            build = g.Builder(node)
            count = build.op("Shape", [tokens], {"start": 1, "end": 2})
            nothing = build.op("Sub", [count, count])
            g.replace(node.outputs[0], build.op("Sub", [nothing, keep]))
    g.remove_dead(program.model)
