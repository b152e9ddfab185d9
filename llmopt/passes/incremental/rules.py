"""How operators carry tokens on: one rule an operator, and none for an operator is a refusal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.ir.traits import ALONG_AXIS, ELEMENTWISE, REDUCTIONS
from llmopt.passes.incremental.contraction import attention, einsum, matmul
from llmopt.passes.incremental.elementwise import elementwise
from llmopt.passes.incremental.flow import (
    KEYS,
    TOKENS,
    Axis,
    Flow,
    checked,
    plain,
    refuse,
    reshaped,
    sizes,
    special,
    tidy,
    untouched,
)
from llmopt.passes.incremental.reading import DecoderReading

Rule = Callable[[DecoderReading, ir.Node], Flow]


def carry(reading: DecoderReading, node: ir.Node) -> None:
    """Say where the tokens are in what ``node`` gives, if it reads any.

    Raises:
        NotIncrementalError: it relates tokens in a way that a cache cannot follow.
    """
    if node.op_type in ("Shape", "Size") or not _reads_tokens(reading, node):
        return
    rule = RULES.get(node.op_type) if node.domain == "" else None
    if rule is None:
        raise refuse(node, "is not known to treat each token by itself")
    flow = checked(node, rule(reading, node))
    for out in node.outputs:
        reading.flows[out] = flow if node.op_type != "Split" else _part(node, flow, out)


def _part(node: ir.Node, flow: Flow, out: ir.Value) -> Flow:
    """Return the flow of one part of a Split, as wide as it is."""
    at = g.attribute(node, "axis", 0) % len(flow.axes)
    width = plain(node, [sizes(node, out)[at]])[0]
    return replace(flow, axes=(*flow.axes[:at], width, *flow.axes[at + 1 :]))


def _reads_tokens(reading: DecoderReading, node: ir.Node) -> bool:
    inner = (
        value
        for attr in node.attributes.values()
        if attr.type is ir.AttributeType.GRAPH
        for each in attr.as_graph().all_nodes()
        for value in each.inputs
    )
    return any(reading.flow(value) is not None for value in (*node.inputs, *inner))


def only(reading: DecoderReading, node: ir.Node) -> Flow:
    """Return the first operand's flow; no other operand depends on tokens.

    Raises:
        NotIncrementalError: another one does.
    """
    moving = reading.moving(node)
    if len(moving) != 1 or moving[0][0] != 0:
        raise refuse(node, "has operands of tokens where none is expected")
    return moving[0][1]


def _shaped(reading: DecoderReading, node: ir.Node) -> Flow:
    """Carry tokens through a reshape of any kind."""
    flow = only(reading, node)
    after = sizes(node, node.outputs[0])
    axes = reshaped(flow.axes, after)
    if axes is None:
        raise refuse(node, f"mixes the axes of tokens: {flow.axes} into {after}")
    if flow.holds(KEYS) and node.op_type == "Reshape":
        reading.stretched.append(node)
    return replace(flow, axes=axes)


def _transpose(reading: DecoderReading, node: ir.Node) -> Flow:
    flow = only(reading, node)
    order = g.attribute(node, "perm", None) or range(len(flow.axes))[::-1]
    return replace(flow, axes=tuple(flow.axes[axis] for axis in order))


def _expand(reading: DecoderReading, node: ir.Node) -> Flow:
    """Carry tokens through a repetition of axes that hold none."""
    flow, after = only(reading, node), sizes(node, node.outputs[0])
    before = sizes(node, g.operand(node, 0))
    offset = len(after) - len(before)
    if flow.holds(KEYS):
        raise refuse(node, "repeats scores")
    axes = list(plain(node, after[:offset]))
    for axis, old, new in zip(flow.axes, before, after[offset:], strict=True):
        axes.append(axis if old == new else _repeated(node, axis, new))
    return replace(flow, axes=tuple(axes))


def _repeated(node: ir.Node, axis: Axis, size: g.Dim) -> Axis:
    if special(axis):
        raise refuse(node, "repeats tokens or sequences")
    return plain(node, [size])[0]


def _along(reading: DecoderReading, node: ir.Node, axes: Sequence[int]) -> Flow:
    """Carry tokens through an operator that runs along ``axes`` and keeps all axes."""
    flow, after = only(reading, node), sizes(node, node.outputs[0])
    places = [axis % len(flow.axes) for axis in axes]
    before = sizes(node, g.operand(node, 0))
    whole = node.op_type == "Slice" and all(before[i] == after[i] for i in places)
    whole = whole and not any(KEYS in flow.axes[i] for i in places)
    if not whole:
        untouched(node, flow, places)
    changed = [
        plain(node, [after[i]])[0] if i in places and not whole else axis
        for i, axis in enumerate(flow.axes)
    ]
    return replace(flow, axes=tuple(changed))


def _along_attribute(default: int) -> Rule:
    """Return the rule of an operator that runs along its attribute ``axis``."""
    return lambda reading, node: _along(reading, node, [g.attribute(node, "axis", default)])


def _softmax(reading: DecoderReading, node: ir.Node) -> Flow:
    flow = only(reading, node)
    axis = g.attribute(node, "axis", -1) % len(flow.axes)
    if flow.axes[axis] != (KEYS,):
        return _along(reading, node, [axis])
    if not flow.causal:
        raise refuse(node, "lets a token see later ones: nothing masks them")
    reading.softmaxes.append(node)
    return replace(flow, weights=True)


def _normalized(reading: DecoderReading, node: ir.Node) -> Flow:
    """Carry tokens through a normalization over ``axis`` and what follows it."""
    flow = only(reading, node)
    first = g.attribute(node, "axis", -1) % len(flow.axes)
    return _along(reading, node, range(first, len(flow.axes)))


def _cumulated(reading: DecoderReading, node: ir.Node) -> Flow:
    axis = g.scalar(g.operand(node, 1))
    if axis is None:
        raise refuse(node, "runs along an axis that is not known")
    flow = only(reading, node)
    at = int(axis) % len(flow.axes)
    if TOKENS in flow.axes[at]:
        raise refuse(node, "sums over all earlier tokens, and the cache holds keys and values")
    untouched(node, flow, [at])
    return flow


def _reduced(reading: DecoderReading, node: ir.Node) -> Flow:
    flow = only(reading, node)
    given = g.ints(g.optional(node, 1)) if len(node.inputs) > 1 else None
    if given is None and node.op_type in ("ArgMax", "ArgMin"):
        given = [g.attribute(node, "axis", 0)]
    if not given and g.attribute(node, "noop_with_empty_axes", 0):
        return flow
    places = [axis % len(flow.axes) for axis in given or range(len(flow.axes))]
    untouched(node, flow, places)
    kept = g.attribute(node, "keepdims", 1)
    axes = [() if i in places else a for i, a in enumerate(flow.axes) if kept or i not in places]
    return Flow(tuple(axes), flow.layer)


def _sliced(reading: DecoderReading, node: ir.Node) -> Flow:
    axes = g.ints(g.optional(node, 3))
    starts = g.ints(node.inputs[1])
    if axes is None and starts is None:
        raise refuse(node, "cuts axes that are not known")
    return _along(reading, node, range(len(starts or ())) if axes is None else axes)


def _padded(reading: DecoderReading, node: ir.Node) -> Flow:
    flow, pads = only(reading, node), g.ints(node.inputs[1])
    count = len(flow.axes)
    axes = g.ints(g.optional(node, 3)) or list(range(count))
    if pads is None:
        raise refuse(node, "pads by sizes that are not known")
    places = [a % count for i, a in enumerate(axes) if pads[i] or pads[i + len(axes)]]
    return _along(reading, node, places)


def _concatenated(reading: DecoderReading, node: ir.Node) -> Flow:
    moving = dict(reading.moving(node))
    first = next(iter(moving.values()))
    at = g.attribute(node, "axis", 0) % len(first.axes)
    for flow in moving.values():
        untouched(node, flow, [at])
    others = [axis for i, axis in enumerate(first.axes) if i != at]
    if any([a for i, a in enumerate(f.axes) if i != at] != others for f in moving.values()):
        raise refuse(node, "puts tokens beside other tokens")
    width = plain(node, [sizes(node, node.outputs[0])[at]])[0]
    beside = (*first.axes[:at], (), *first.axes[at + 1 :])
    for index in range(len(node.inputs)):
        if index not in moving:
            reading.require_axes(node, index, beside)
    return replace(first, axes=(*first.axes[:at], width, *first.axes[at + 1 :]))


def _gathered(reading: DecoderReading, node: ir.Node) -> Flow:
    data, index = g.operand(node, 0), g.operand(node, 1)
    flow, chosen = reading.flow(data), reading.flow(index)
    axis = g.attribute(node, "axis", 0)
    if flow is not None and chosen is not None:
        raise refuse(node, "lets tokens choose among tokens")
    if flow is not None:
        at = axis % len(flow.axes)
        untouched(node, flow, [at])
        picked = plain(node, sizes(node, index))
        return replace(flow, axes=(*flow.axes[:at], *picked, *flow.axes[at + 1 :]))
    assert chosen is not None
    dims = sizes(node, data)
    at = axis % len(dims)
    if reading.proofs.varies(data):
        reading.require_axes(node, 0, [()] * len(dims))  # refuses what is as long as the tokens are
    before, after = plain(node, dims[:at]), plain(node, dims[at + 1 :])
    return replace(chosen, axes=(*before, *chosen.axes, *after))


def _gathered_nd(reading: DecoderReading, node: ir.Node) -> Flow:
    chosen = reading.flow(node.inputs[1])
    dims, depth = sizes(node, g.operand(node, 0)), g.static(node.inputs[1], -1)
    if chosen is None or depth is None or g.attribute(node, "batch_dims", 0):
        raise refuse(node, "chooses among tokens")
    if reading.flow(node.inputs[0]) is not None or reading.proofs.varies(g.operand(node, 0)):
        raise refuse(node, "lets tokens choose among tokens")
    untouched(node, chosen, [-1])
    return replace(chosen, axes=(*chosen.axes[:-1], *plain(node, dims[depth:])))


def _one_hot(reading: DecoderReading, node: ir.Node) -> Flow:
    flow = only(reading, node)
    axis = g.attribute(node, "axis", -1) % (len(flow.axes) + 1)
    width = plain(node, [sizes(node, node.outputs[0])[axis]])[0]
    return replace(flow, axes=(*flow.axes[:axis], width, *flow.axes[axis:]))


def _rotated(reading: DecoderReading, node: ir.Node) -> Flow:
    """Carry tokens through RotaryEmbedding, its tables beside them."""
    flow = only(reading, node)
    batch, tokens = flow.axes[0], flow.axes[-2]
    untouched(node, flow, [-1])
    if g.optional(node, 3) is not None:
        reading.require_axes(node, 3, (batch, tokens))
        return flow
    for index in (1, 2):
        reading.require_axes(node, index, (batch, tokens, flow.axes[-1]))
    return flow


def _convolved(reading: DecoderReading, node: ir.Node) -> Flow:
    flow = only(reading, node)
    kernel = sizes(node, g.operand(node, 1))[2:]
    pads, strides = g.attribute(node, "pads", ()), g.attribute(node, "strides", ())
    if any(size != 1 for size in kernel) or any(pads) or any(step != 1 for step in strides):
        untouched(node, flow, range(1, len(flow.axes)))
    untouched(node, flow, [1])
    width = tidy((sizes(node, node.outputs[0])[1],))
    return replace(flow, axes=(flow.axes[0], width, *flow.axes[2:]))


def _batch_normalized(reading: DecoderReading, node: ir.Node) -> Flow:
    if g.attribute(node, "training_mode", 0):
        raise refuse(node, "mixes the sequences of a batch")
    flow = only(reading, node)
    untouched(node, flow, [1])
    return flow


RULES: Final[Mapping[str, Rule]] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys((*REDUCTIONS, "ArgMax", "ArgMin"), _reduced),
    **{name: _along_attribute(axis) for name, axis in ALONG_AXIS.items()},
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten"), _shaped),
    "Attention": attention,
    "BatchNormalization": _batch_normalized,
    "Concat": _concatenated,
    "Conv": _convolved,
    "CumSum": _cumulated,
    "Einsum": einsum,
    "Expand": _expand,
    "Gather": _gathered,
    "GatherND": _gathered_nd,
    "LayerNormalization": _normalized,
    "MatMul": matmul,
    "OneHot": _one_hot,
    "Pad": _padded,
    "RMSNormalization": _normalized,
    "RotaryEmbedding": _rotated,
    "Slice": _sliced,
    "Softmax": _softmax,
    "Split": _along_attribute(0),
    "Tile": _expand,
    "TopK": _along_attribute(-1),
    "Transpose": _transpose,
}
