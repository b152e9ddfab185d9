"""Recognize rotary position embedding and turn its angles into one table.

Rewrites::

    x * cos + Concat(-x[d/2:], x[:d/2]) * sin    into    RotaryEmbedding(x, cos, sin, position_ids)

with ``cos`` and ``sin`` [positions, d/2] computed now: they are evaluated at every position up to
``max_length``, and the table is used only if looking it up agrees with the graph at others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir.feeds import Case, feeds
from llmopt.ir.match import Bound, either, matches, op
from llmopt.ir.probe import Probe
from llmopt.ir.program import Program, Role
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.raise_attention import tokens_first, tokens_last

Array = npt.NDArray[Any]
_PATTERN: Final = op(
    "Add",
    op("Mul", "x", "cos"),
    op(
        "Mul",
        either(
            op("Concat", op("Neg", "upper"), "lower", axis=-1),
            op("Concat", op("Neg", "upper"), "lower", axis=3),
        ),
        "sin",
    ),
)


@dataclass(frozen=True)
class FuseRotary(Pass):
    """Fuse rotary position embedding (rotate-half form) into one operator with one table.

    Numerics: the table holds what the graph computes, bit for bit; the rotation is within 1e-6
    relative in float32. Positions at or past ``max_length`` are outside the table.
    Scope: the graph. Leaves: angles that depend on anything but positions, other rotations.
    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, section 3.2.
    """

    name: ClassVar[str] = "fuse-rotary"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        tables: dict[ir.Value, ir.Value | str] = {}
        for node in g.nodes(program.graph, "Add"):
            ways = list(matches(_PATTERN, node.outputs[0]))
            if not ways:
                continue
            # both operands of a product may be x: the one whose halves are turned is
            bound = next((way for way in ways if _obstacle(way) is None), ways[0])
            reason = _obstacle(bound) or self._fuse(program, node, bound, tables)
            if reason:
                outcome.miss(node, reason, "rotary")
            else:
                outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome

    @staticmethod
    def _fuse(
        program: Program, node: ir.Node, bound: Bound, tables: dict[ir.Value, ir.Value | str]
    ) -> str | None:
        looked_up = []
        for name in ("cos", "sin"):
            value = bound[name]
            if value not in tables:
                tables[value] = _table(program, value, name)
            if isinstance(table := tables[value], str):
                return f"{name}: {table}"
            looked_up.append(table)
        x, build = bound["x"], g.Builder(node)
        heads, width = g.static(x, 1), g.static(x, 3)
        assert heads is not None
        assert width is not None
        inputs = [tokens_first(build, x), *looked_up, positions(program)]
        out = build.op("RotaryEmbedding", inputs, {"num_heads": heads})
        g.replace(node.outputs[0], tokens_last(build, out, x, width))
        return None


def _obstacle(bound: Bound) -> str | None:
    """Return why this is not the rotation of the halves of x, or None."""
    x, lower, upper = bound["x"], bound["lower"], bound["upper"]
    width = g.static(x, -1)
    if g.rank(x) != 4 or g.static(x, 1) is None or width is None:
        return f"x is {g.shape(x)}, not [batch, heads, tokens, width]"
    if part(lower) != (x, 0, width // 2) or part(upper) != (x, width // 2, width):
        return "what it concatenates are not the halves of x"
    return None


def part(value: ir.Value) -> tuple[ir.Value, int, int] | None:
    """Return (x, start, end) where ``value`` is ``x[..., start:end]``."""
    node = g.producer(value, "Slice", "Split")
    if node is None:
        return None
    x = g.operand(node, 0)
    width, size = g.static(x, -1), g.static(value, -1)
    if width is None or size is None:
        return None
    if node.op_type == "Split":
        if g.attribute(node, "axis", 0) not in (-1, (g.rank(x) or 0) - 1):
            return None
        before = [g.static(v, -1) or 0 for v in node.outputs[: value.index()]]
        return x, sum(before), sum(before) + size
    starts, axes = g.ints(node.inputs[1]), g.ints(g.optional(node, 3))
    steps = g.ints(g.optional(node, 4)) or [1]
    if starts is None or axes not in ([-1], [(g.rank(x) or 0) - 1]) or steps != [1]:
        return None
    start = starts[0] + width if starts[0] < 0 else starts[0]
    return x, start, start + size


def _table(program: Program, value: ir.Value, name: str) -> ir.Value | str:
    """Return the table of ``value`` as an initializer, or why there is none."""
    probe = Probe(program, [value])
    if (reason := _not_positional(program, probe)) is not None:
        return reason
    limit = program.facts.max_length
    # at least as long as the cases below, so that looking them up stays inside
    everywhere = _angles(program, probe, Case(1, max(limit, 9)))
    if isinstance(everywhere, str):
        return everywhere
    table = everywhere[0]
    for case in (Case(3, 5), Case(3, 5, 4, "left"), Case(3, 6, 0, "right")):
        if case.past and not program.signature.has_cache:
            continue
        if not _same(_angles(program, probe, case), table[_positions(program, case)]):
            return f"it is no function of the position alone (at {case.label})"
    half = table.shape[-1] // 2
    if not np.array_equal(table[:, :half], table[:, half:]):
        return "its halves differ: another rotation than rotate-half"
    return _shared(program, name, np.ascontiguousarray(table[:limit, :half]))


def _not_positional(program: Program, probe: Probe) -> str | None:
    """Return why the angles cannot be a table of positions, or None."""
    if (reason := probe.obstacle()) is not None:
        return reason
    port = program.signature.find(Role.POSITIONS)
    if extra := probe.reads() - ({port.name} if port else set()):
        return f"it depends on {', '.join(sorted(extra))}"
    return None if program.facts.max_length else "the longest sequence is not known"


def _same(found: Array | str, looked_up: Array) -> bool:
    if isinstance(found, str) or found.shape[1:] != looked_up.shape[1:]:
        return False
    return np.array_equal(np.broadcast_to(found, looked_up.shape), looked_up)


def _positions(program: Program, case: Case) -> Array:
    if (port := program.signature.find(Role.POSITIONS)) is not None:
        return feeds(program.signature, case, 2, {port.name})[port.name]
    return np.arange(case.past, case.past + case.new)[None].repeat(case.batch, 0)


def _angles(program: Program, probe: Probe, case: Case) -> Array | str:
    """Return the evaluated angles as [B or 1, S, D]."""
    sizes = {"B": case.batch, "S": case.new, "P": case.past, "T": case.past + case.new}
    found = probe.attempt(feeds(program.signature, case, 2, probe.reads()), sizes)
    if isinstance(found, str):
        return found
    array: Array = found[0]
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 2:
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
    for node in g.nodes(program.graph, "Expand"):
        if node.name == "positions":
            return node.outputs[0]
    tokens = program.input(Role.TOKENS) or program.graph.inputs[0]
    build = g.Builder(program.graph[0])
    sizes = build.op("Shape", [tokens], {"start": 0, "end": 2})
    count = build.op("Squeeze", [build.op("Shape", [tokens], {"start": 1, "end": 2})])
    zero, one = build.constant(0, "int64"), build.constant(1, "int64")
    row = build.op("Range", [zero, count, one])
    if (past := program.input(Role.PAST_KEY)) is not None:
        row = build.op("Add", [row, _length(build, program.input(Role.MASK), past, count)])
    result = build.op("Expand", [row, sizes], name="positions")
    dims = g.shape(tokens) or ["B", "S"]
    result.shape, result.type = ir.Shape(dims[:2]), ir.TensorType(ir.DataType.INT64)
    return result


def _length(build: g.Builder, mask: ir.Value | None, past: ir.Value, count: ir.Value) -> ir.Value:
    """Return P: of the mask where there is one, as a past in place is as long as it has room."""
    if mask is None:
        return build.op("Shape", [past], {"start": 2, "end": 3})
    return build.op("Sub", [build.op("Shape", [mask], {"start": 1, "end": 2}), count])
