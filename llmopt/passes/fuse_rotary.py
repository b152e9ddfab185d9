"""Recognize rotary position embedding and turn its angles into one table.

Rewrites::

    x * cos + Concat(-x[d/2:], x[:d/2]) * sin    into    RotaryEmbedding(x, cos, sin, position_ids)
    Concat(a * cos - b * sin, b * cos + a * sin)    into    the same of Concat(a, b)
    x * cos + Stack(-x[1::2], x[::2]) * sin      into    the same, interleaved

with ``cos`` and ``sin`` [positions, d/2] computed now: they are evaluated at every position up to
``max_length``, and the table is used only if looking it up agrees with the graph at others. Where
only a part of each head is rotated, ``x`` is that part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir.match import Bound, either, matches, op
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.raise_attention import tokens_first, tokens_last
from llmopt.passes.rotary_tables import Layout, Pairing, positions, table

_SIN: Final = "sin"
_HALVES: Final = op(
    "Add",
    op("Mul", "x", "cos"),
    op(
        "Mul",
        either(
            op("Concat", op("Neg", "upper"), "lower", axis=-1),
            op("Concat", op("Neg", "upper"), "lower", axis=3),
        ),
        _SIN,
    ),
)
_PAIRS: Final = op(
    "Add",
    op("Mul", "x", "cos"),
    op(
        "Mul",
        op(
            "Reshape",
            op(
                "Concat",
                op("Unsqueeze", op("Neg", "upper"), "axis"),
                op("Unsqueeze", "lower", "axis2"),
                axis=-1,
            ),
        ),
        _SIN,
    ),
)
_APART: Final = op(
    "Concat",
    op("Sub", op("Mul", "lower", "cos"), op("Mul", "upper", _SIN)),
    op("Add", op("Mul", "upper", "cos"), op("Mul", "lower", _SIN)),
    axis=-1,
)


@dataclass(frozen=True)
class RotaryMatch:
    """A rotation that is written out.

    Args:
        x: Rotated value, of four axes.
        cos: Cosines, of as many axes or broadcast to them.
        sin: Sines.
        layout: Axes of the heads and the tokens of x.
        pairing: Pairing of the numbers that rotate together, and its form in the tables.
        apart: Halves to be concatenated first, where x is not one value.
    """

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    layout: Layout
    pairing: Pairing
    apart: tuple[ir.Value, ir.Value] | None = None


@dataclass(frozen=True)
class FuseRotary(Pass):
    """Fuse rotary position embedding, of halves or of pairs, into one operator with one table.

    Numerics: the table holds what the graph computes, bit for bit; the rotation is within 1e-6
    relative in float32. Positions at or past ``max_length`` are outside the table.
    Scope: the graph. Leaves: angles that depend on anything but positions, other rotations.
    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, section 3.2.
    """

    name: ClassVar[str] = "fuse-rotary"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        tables: dict[tuple[ir.Value, Layout, Pairing], ir.Value | str] = {}
        for node in g.nodes(program.graph, "Add", "Concat"):
            found = _find(node.outputs[0])
            if found is None:
                continue
            reason = found if isinstance(found, str) else self._fuse(program, node, found, tables)
            if reason:
                outcome.miss(node, reason, "rotary")
            else:
                outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome

    @staticmethod
    def _fuse(
        program: Program,
        node: ir.Node,
        rotation: RotaryMatch,
        tables: dict[tuple[ir.Value, Layout, Pairing], ir.Value | str],
    ) -> str | None:
        looked_up = []
        for name, value in (("cos", rotation.cos), (_SIN, rotation.sin)):
            key = (value, rotation.layout, rotation.pairing)
            if key not in tables:
                tables[key] = table(program, value, name, rotation.layout, rotation.pairing)
            if isinstance(made := tables[key], str):
                return f"{name}: {made}"
            looked_up.append(made)
        _rotate(g.Builder(node), node.outputs[0], rotation, [*looked_up, positions(program)])
        return None


def _rotate(build: g.Builder, old: ir.Value, rotation: RotaryMatch, rest: list[ir.Value]) -> None:
    """Put the operator in the place of ``old``."""
    x, heads_first = rotation.x, rotation.layout is Layout.HEADS_FIRST
    if rotation.apart is not None:
        x = build.op("Concat", list(rotation.apart), {"axis": -1}, like=rotation.x)
    heads, width = g.static(x, 1 if heads_first else 2), g.static(x, 3)
    assert heads is not None
    assert width is not None
    attributes = {"num_heads": heads} | ({"interleaved": 1} if rotation.pairing is _TWINS else {})
    if heads_first:
        out = build.op("RotaryEmbedding", [tokens_first(build, x), *rest], attributes)
        g.replace(old, tokens_last(build, out, x, width))
        return
    sizes = g.shape(x)
    assert sizes is not None
    flat = build.op(
        "Reshape",
        [x, build.constant([0, 0, heads * width], "int64")],
        like=x,
        shape=[*sizes[:2], heads * width],
    )
    out = build.op("RotaryEmbedding", [flat, *rest], attributes, like=flat)
    split = build.op(
        "Reshape", [out, build.constant([0, 0, heads, width], "int64")], like=x, shape=sizes
    )
    g.replace(old, split)


_TWINS: Final = Pairing.TWINS


def _find(value: ir.Value) -> RotaryMatch | str | None:
    """Return the rotation that ``value`` is, the reason why it is not the operator, or None."""
    reason: str | None = None
    for found in _ways(value):
        if isinstance(found, RotaryMatch):
            return found
        reason = reason or found
    return reason


def _ways(value: ir.Value) -> Iterator[RotaryMatch | str]:
    for bound in matches(_HALVES, value):
        yield _checked(bound, bound["x"], Pairing.HALVES)
    for bound in matches(_PAIRS, value):
        yield _checked(bound, bound["x"], Pairing.TWINS)
    for bound in matches(_APART, value):
        source = part(bound["lower"])
        if source is not None and g.rank(source[0]) == 4:
            yield _checked(bound, source[0], Pairing.APART)


def _checked(bound: Bound, x: ir.Value, pairing: Pairing) -> RotaryMatch | str:
    """Return the rotation, or why this is not one of the two parts of x."""
    width, layout = g.static(x, -1), _layout(x)
    if layout is None or width is None:
        return f"x is {g.shape(x)}, not [batch, heads, tokens, width]"
    lower, upper = part(bound["lower"]), part(bound["upper"])
    halves = ((x, 0, width // 2, 1), (x, width // 2, width, 1))
    twins = ((x, 0, width, 2), (x, 1, width, 2))
    apart = (bound["lower"], bound["upper"])
    if pairing is Pairing.APART and (lower, upper) == twins:  # they leave as halves
        return RotaryMatch(x, bound["cos"], bound[_SIN], layout, pairing, apart)
    if (lower, upper) != (twins if pairing is Pairing.TWINS else halves):
        return "the rotated values are neither the halves of x nor its even and odd elements"
    if pairing is Pairing.TWINS and g.shape(bound["root"].outputs[0]) != g.shape(x):
        return "the rotated elements are not interleaved again"
    return RotaryMatch(x, bound["cos"], bound[_SIN], layout, pairing)


def _layout(x: ir.Value) -> Layout | None:
    """Return where the heads of x are: the axis of the two inner ones that has a fixed size."""
    if g.rank(x) != 4:
        return None
    if g.static(x, 1) is not None:
        return Layout.HEADS_FIRST
    return Layout.TOKENS_FIRST if g.static(x, 2) is not None else None


def part(value: ir.Value) -> tuple[ir.Value, int, int, int] | None:
    """Return (x, start, end, step) where ``value`` is ``x[..., start:end:step]``."""
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
        return x, sum(before), sum(before) + size, 1
    starts, axes = g.ints(node.inputs[1]), g.ints(g.optional(node, 3))
    step = (g.ints(g.optional(node, 4)) or [1])[0]
    if starts is None or axes not in ([-1], [(g.rank(x) or 0) - 1]) or step < 1:
        return None
    start = starts[0] + width if starts[0] < 0 else starts[0]
    return x, start, start + size if step == 1 else width, step
