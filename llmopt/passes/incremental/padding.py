"""Padding for decoders that have none: what a padded row gives is what the row alone gives.

A decoder that takes tokens alone can be run on rows of one length only. With a mask and positions
of its own it can be batched like any other: positions are looked up instead of counted, and keys
of padding are masked. Both are possible where masks and biases depend on distances alone.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

from llmopt.interface.signature import Port, Role, Signature
from llmopt.ir import graph as g
from llmopt.ir.attention import MASK
from llmopt.ir.program import Program
from llmopt.passes.incremental.flow import BATCH, KEYS, Flow
from llmopt.passes.incremental.reading import DecoderReading, Use

_PORTS: Final = (
    Port("attention_mask", Role.MASK, "int64", ("B", "T")),
    Port("position_ids", Role.POSITIONS, "int64", ("B", "S")),
)


def can_be_padded(reading: DecoderReading) -> bool:
    """Whether the decoder, which takes tokens alone, can get a padding mask.

    Raises:
        NotIncrementalError: what meets tokens cannot be evaluated.
    """
    given = [port.role for port in reading.program.signature.inputs]
    scores = [reading.flows[node.outputs[0]] for node in reading.softmaxes]
    return (
        given == [Role.TOKENS]
        and all(_is_square(flow) for flow in scores)
        and all(_can_move(reading, use) for use in reading.uses)
    )


def _is_square(flow: Flow) -> bool:
    return (BATCH,) in flow.axes and (KEYS,) in flow.axes


def _can_move(reading: DecoderReading, use: Use) -> bool:
    value = g.operand(use.node, use.index)
    if use.keys is not None:
        return reading.proofs.sliding(use.node, value, (use.rows, use.keys))
    return use.rows is None or use.batch is not None


def add_padding(program: Program) -> None:
    """Give the decoder a mask and positions as inputs; what reads them comes later."""
    for port in _PORTS:
        value = ir.Value(
            name=g.unused(program.graph, port.name),
            shape=ir.Shape(list(port.shape)),
            type=ir.TensorType(ir.DataType.INT64),
        )
        program.graph.inputs.append(value)
        port_named = Port(str(value.name), port.role, port.dtype, port.shape)
        inputs = (*program.signature.inputs, port_named)
        program.signature = Signature(inputs, program.signature.outputs)


def mask_padding(reading: DecoderReading) -> None:
    """Let no attention see a key of padding."""
    mask = reading.program.input(Role.MASK)
    assert mask is not None
    build = g.Builder(reading.program.graph)
    real = build.op(
        "Cast",
        [mask],
        {"to": int(ir.DataType.BOOL)},
        name="real",
        like=mask,
        dtype=ir.DataType.BOOL,
    )
    seen: dict[tuple[int, ...], ir.Value] = {}
    for fused in reading.fused:
        node = fused.node
        pad = _spread(build, real, (1, 2), seen)
        node.resize_inputs(max(MASK + 1, len(node.inputs)))
        node.replace_input_with(MASK, _combined(build, node.inputs[MASK], pad))
    for softmax in reading.softmaxes:
        axes = reading.flows[softmax.outputs[0]].axes
        ones = tuple(i for i, axis in enumerate(axes) if axis not in ((BATCH,), (KEYS,)))
        pad = _spread(build, real, ones, seen)
        softmax.replace_input_with(0, _where(build, pad, g.operand(softmax, 0)))


def _spread(
    build: g.Builder, real: ir.Value, ones: tuple[int, ...], seen: dict[tuple[int, ...], ir.Value]
) -> ir.Value:
    """Return the mask [B, T] with axes of size 1 put in."""
    if ones not in seen:
        spread = build.op("Unsqueeze", [real, build.constant(list(ones), "int64")])
        dims: list[g.Dim] = ["B", "T"]
        for at in ones:
            dims.insert(at, 1)
        spread.shape, spread.type = ir.Shape(dims), real.type
        seen[ones] = spread
    return seen[ones]


def _combined(build: g.Builder, mask: ir.Value | None, pad: ir.Value) -> ir.Value:
    if mask is None:
        return pad
    if mask.dtype != ir.DataType.BOOL:
        return _where(build, pad, mask)
    return build.op("And", [mask, pad], shape=g.broadcast(mask, pad), dtype=mask.dtype)


def _where(build: g.Builder, pad: ir.Value, scores: ir.Value) -> ir.Value:
    """Return scores, as low as can be where padding is: not -inf, a row of padding stays finite."""
    kind = (scores.dtype or ir.DataType.FLOAT).numpy()
    low = build.constant(np.asarray(np.finfo(kind).min, kind))
    sizes = g.broadcast(pad, scores)
    return build.op("Where", [pad, scores, low], shape=sizes, dtype=scores.dtype)
