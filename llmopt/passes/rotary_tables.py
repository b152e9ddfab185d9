"""Tables of rotary angles: what a graph computes at each position, found by evaluating it."""

from __future__ import annotations

import enum

import numpy as np
import onnx_ir as ir

from llmopt.interface.arrays import Array
from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir import landmarks
from llmopt.ir.feeds import Case, feeds
from llmopt.ir.landmarks import Landmark
from llmopt.ir.probe import Probe
from llmopt.ir.program import Program


class Layout(enum.Enum):
    """Where heads and tokens are: [B, H, S, D] or [B, S, H, D]."""

    HEADS_FIRST = enum.auto()
    TOKENS_FIRST = enum.auto()


class Pairing(enum.Enum):
    """Which numbers turn together, and what the angles [.., S, D] look like.

    ``HALVES``: i and i + D/2; each angle is there twice, D/2 apart. ``TWINS``: 2 i and 2 i + 1;
    each angle is there twice, side by side. ``APART``: as ``HALVES``, each angle once, [.., D/2].
    """

    HALVES = "halves"
    TWINS = "neighbours"
    APART = "parts"


def table(
    program: Program, value: ir.Value, name: str, layout: Layout, pairing: Pairing
) -> ir.Value | str:
    """Return the table of ``value`` [positions, D/2] as an initializer, or why there is none.

    Args:
        program: Program that holds the value.
        value: Cosines or sines.
        name: ``"cos"`` or ``"sin"``.
        layout: Layout of the rotated value.
        pairing: Form of the angles.
    """
    probe = Probe(program, [value])
    if (reason := _not_positional(program, probe)) is not None:
        return reason
    limit = program.facts.max_length
    # at least as long as the cases below, so that looking them up stays inside
    everywhere = _angles(program, probe, Case(1, max(limit, 9)), layout)
    if isinstance(everywhere, str):
        return everywhere
    angles = everywhere[0]
    for case in (Case(3, 5), Case(3, 5, 4, "left"), Case(3, 6, 0, "right")):
        if case.past and not program.signature.has_cache:
            continue
        if not _same(_angles(program, probe, case, layout), angles[_positions(program, case)]):
            return f"its angles depend on more than the position (at {case.label})"
    single = _once(angles[:limit], pairing)
    if single is None:
        return f"its {pairing.value} differ: both numbers of a rotated pair need one angle"
    return _shared(program, name, np.ascontiguousarray(single))


def _once(angles: Array, pairing: Pairing) -> Array | None:
    """Return each angle once, or None where those of two numbers that turn together differ."""
    if pairing is Pairing.APART:
        return angles
    half = angles.shape[-1] // 2
    first, second = angles[:, :half], angles[:, half:]
    if pairing is Pairing.TWINS:
        first, second = angles[:, ::2], angles[:, 1::2]
    return first if np.array_equal(first, second) else None


def _not_positional(program: Program, probe: Probe) -> str | None:
    """Return why the angles cannot be a table of positions, or None."""
    if (reason := probe.obstacle()) is not None:
        return reason
    port = program.signature.find(Role.POSITIONS)
    if extra := probe.reads() - ({port.name} if port else set()):
        return f"it depends on {', '.join(sorted(extra))}"
    return None if program.facts.max_length else "the longest sequence is not known"


def _same(table: Array | str, looked_up: Array) -> bool:
    if isinstance(table, str) or table.shape[1:] != looked_up.shape[1:]:
        return False
    return np.array_equal(np.broadcast_to(table, looked_up.shape), looked_up)


def _positions(program: Program, case: Case) -> Array:
    if (port := program.signature.find(Role.POSITIONS)) is not None:
        return feeds(program.signature, case, 2, {port.name})[port.name]
    return np.arange(case.past, case.past + case.new)[None].repeat(case.batch, 0)


def _angles(program: Program, probe: Probe, case: Case, layout: Layout) -> Array | str:
    """Return the evaluated angles as [B or 1, S, D]."""
    sizes = {"B": case.batch, "S": case.new, "P": case.past, "T": case.past + case.new}
    found = probe.attempt(feeds(program.signature, case, 2, probe.reads()), sizes)
    if isinstance(found, str):
        return found
    array: Array = found[0]
    heads = 1 if layout is Layout.HEADS_FIRST else 2
    if array.ndim == 4 and array.shape[heads] == 1:
        array = array.squeeze(heads)
    elif array.ndim == 3 and layout is Layout.TOKENS_FIRST and array.shape[1] == 1:
        array = array[None, :, 0]  # [S, 1, D]
    if array.ndim == 2 and layout is Layout.HEADS_FIRST:
        array = array[None]
    if array.ndim != 3 or array.shape[1] != case.new:
        return f"it is {list(array.shape)}, not [batch, 1, tokens, width]"
    return array


def _shared(program: Program, name: str, table: Array) -> ir.Value:
    """Return an initializer that holds ``table``; layers with the same angles share one."""
    for known, value in program.graph.initializers.items():
        if known.startswith(f"rotary_{name}") and value.const_value is not None:
            held = value.const_value.numpy()
            if held.shape == table.shape and np.array_equal(held, table):
                return value
    return g.add_initializer(program.graph, f"rotary_{name}", ir.tensor(table))


def positions(program: Program) -> ir.Value:
    """Return position_ids [B, S]: the input, or P, P+1, P+2... where the model has none."""
    if (given := program.input(Role.POSITIONS)) is not None:
        return given
    if (known := program.landmark(Landmark.POSITIONS)) is not None:
        return known
    tokens = program.input(Role.TOKENS) or program.graph.inputs[0]
    build = g.Builder(program.graph[0])
    sizes = build.op("Shape", [tokens], {"start": 0, "end": 2})
    count = build.op("Squeeze", [build.op("Shape", [tokens], {"start": 1, "end": 2})])
    zero, one = build.constant(0, "int64"), build.constant(1, "int64")
    row = build.op("Range", [zero, count, one])
    if (past := program.input(Role.PAST_KEY)) is not None:
        row = build.op("Add", [row, _length(build, program.input(Role.MASK), past, count)])
    result = landmarks.op(build, Landmark.POSITIONS, "Expand", [row, sizes])
    dims = g.shape(tokens) or ["B", "S"]
    result.shape, result.type = ir.Shape(dims[:2]), ir.TensorType(ir.DataType.INT64)
    return result


def _length(build: g.Builder, mask: ir.Value | None, past: ir.Value, count: ir.Value) -> ir.Value:
    """Return P: of the mask where there is one, as a past in place is as long as it has room."""
    if mask is None:
        return build.op("Shape", [past], {"start": 2, "end": 3})
    return build.op("Sub", [build.op("Shape", [mask], {"start": 1, "end": 2}), count])
