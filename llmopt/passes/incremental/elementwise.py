"""How tokens go through element-wise operators, and when scores become causal in them."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.passes.fuse_attention import FORBIDDEN
from llmopt.passes.incremental.flow import (
    KEYS,
    TOKENS,
    Axis,
    Flow,
    refuse,
    sizes,
    special,
    tidy,
)
from llmopt.passes.incremental.reading import DecoderReading

_COPIES: Final = ("Cast", "Identity", "Dropout")


def elementwise(reading: DecoderReading, node: ir.Node) -> Flow:
    """Carry tokens through an operator that broadcasts its operands."""
    moving = dict(reading.moving(node))
    rank = len(sizes(node, node.outputs[0]))
    merged: list[Axis] = [()] * rank
    for flow in moving.values():
        for at, axis in enumerate(flow.axes, rank - len(flow.axes)):
            merged[at] = _together(node, merged[at], axis)
    beside = tuple(merged)
    for index, value in enumerate(node.inputs):
        if value is None or index in moving:
            continue
        dims = sizes(node, value)
        reading.require_axes(node, index, beside)
        for at, dim in enumerate(dims, rank - len(dims)):
            if merged[at] == () and isinstance(dim, int):
                merged[at] = tidy((dim,))
    flow = Flow(tuple(merged), max(flow.layer for flow in moving.values()))
    return _scores(reading, node, moving, flow) if flow.holds(KEYS) else flow


def _together(node: ir.Node, one: Axis, other: Axis) -> Axis:
    """Return the axis that two broadcast to."""
    if () in (one, other) or one == other:
        return one or other
    if special(one) or special(other):
        raise refuse(node, f"aligns {special(one) or 'numbers'} with {special(other) or 'numbers'}")
    return one


def _scores(reading: DecoderReading, node: ir.Node, moving: dict[int, Flow], flow: Flow) -> Flow:
    """Say whether what comes out is masked, or still weights."""
    if any(each.weights for each in moving.values()):
        return replace(flow, weights=_still_weights(node, moving), causal=True)
    if node.op_type in _COPIES:
        return replace(flow, causal=moving[0].causal)
    axes = _square(node, flow)
    if node.op_type == "Where":
        return replace(flow, causal=_where(reading, node, moving, axes))
    if node.op_type in ("Add", "Sum"):
        senses = dict.fromkeys(set(range(len(node.inputs))) - moving.keys(), "add")
    elif node.op_type == "Sub" and moving.keys() == {0}:
        senses = {1: "subtract"}
    else:
        return flow
    causal = any(each.causal for each in moving.values())
    masks = any(_masks(reading, node, index, sense, axes) for index, sense in senses.items())
    return replace(flow, causal=causal or masks)


def _square(node: ir.Node, flow: Flow) -> tuple[int, int]:
    """Return the axes of queries and of keys, counted from the end."""
    if (TOKENS,) not in flow.axes or (KEYS,) not in flow.axes:
        raise refuse(node, "has scores whose queries and keys are not axes of their own")
    rank = len(flow.axes)
    return flow.axes.index((TOKENS,)) - rank, flow.axes.index((KEYS,)) - rank


def _still_weights(node: ir.Node, moving: dict[int, Flow]) -> bool:
    """Whether weights stay 0 where they are 0."""
    if node.op_type in (*_COPIES, "IsNaN"):
        return True
    if node.op_type in ("Mul", "Div"):
        return moving.keys() == {0} or (node.op_type == "Mul" and len(moving) == 1)
    if node.op_type == "Where" and moving.keys() == {0, 2}:
        test = g.producer(node.inputs[0], "IsNaN")
        return test is not None and test.inputs[0] is node.inputs[2] and _zero(node)
    return False


def _zero(node: ir.Node) -> bool:
    return g.scalar(node.inputs[1]) == 0.0


def _where(
    reading: DecoderReading, node: ir.Node, moving: dict[int, Flow], axes: tuple[int, int]
) -> bool:
    """Whether a choice between scores and a constant masks what is later."""
    for sense, mine, other in (("keep", 1, 2), ("drop", 2, 1)):
        if moving.keys() != {mine}:
            continue
        fill = g.constant(node.inputs[other], 1 << 20)
        low = fill is not None and bool(np.all(fill <= FORBIDDEN))
        return low and (moving[mine].causal or _masks(reading, node, 0, sense, axes))
    return False


def _masks(
    reading: DecoderReading, node: ir.Node, index: int, sense: str, axes: tuple[int, int]
) -> bool:
    """Whether an operand of positions alone masks every key after its query."""
    value = g.operand(node, index)
    if not reading.proofs.varies(value):
        return False
    rank = len(sizes(node, value))
    rows, keys = (rank + axis if rank + axis >= 0 else None for axis in axes)
    dims = sizes(node, value)
    if rows is None or keys is None or dims[rows] == 1 or dims[keys] == 1:
        return False
    return reading.proofs.forbids_later(node, value, sense, (rows, keys))
