"""Reading a decoder from its inputs to its logits, and noting what a cache would change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes.incremental.flow import (
    BATCH,
    KEYS,
    TOKENS,
    Axis,
    Flow,
    refuse,
    sizes,
    special,
)
from llmopt.passes.incremental.proofs import Proofs


@dataclass(frozen=True)
class Use:
    """A value of positions alone that meets tokens.

    Args:
        node: Node that reads the value.
        index: Operand number at that node.
        rows: The axis of new tokens; None if it has none.
        keys: The axis of all tokens; None if it has none.
        batch: The axis that sequences would have; below 0 in front of those it has, None where
            there is no room for it.
    """

    node: ir.Node
    index: int
    rows: int | None
    keys: int | None
    batch: int | None


@dataclass(frozen=True)
class Site:
    """Keys or values that queries meet, written out: past ones go before them.

    Args:
        node: The product.
        index: Operand number of the scores.
        layer: Number of the attention.
        part: ``"key"`` or ``"value"``.
        axes: Meaning of each axis.
        depth: The axis that is D.
    """

    node: ir.Node
    index: int
    layer: int
    part: str
    axes: tuple[Axis, ...]
    depth: int


@dataclass(frozen=True)
class CachedAttention:
    """An Attention whose keys and values get a past.

    Args:
        node: Attention node.
        layer: Number of the attention.
    """

    node: ir.Node
    layer: int


@dataclass
class DecoderReading:
    """What is known of a decoder while it is read.

    Args:
        program: The decoder, unchanged.
        proofs: Proofs about values of positions alone.
        flows: Every value that depends on tokens.
        uses: Operands where positions meet tokens.
        sites: Keys and values of attention that is written out.
        fused: Attention operators.
        stretched: Reshapes of scores, whose keys are more than their queries then.
        softmaxes: Sites where scores become weights.
        layers: Number of attentions so far.
    """

    program: Program
    proofs: Proofs
    flows: dict[ir.Value, Flow] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    fused: list[CachedAttention] = field(default_factory=list)
    stretched: list[ir.Node] = field(default_factory=list)
    softmaxes: list[ir.Node] = field(default_factory=list)
    layers: int = 0

    def flow(self, value: ir.Value | None) -> Flow | None:
        """Return where the tokens are in ``value``, None where it does not depend on them."""
        return None if value is None else self.flows.get(value)

    def moving(self, node: ir.Node) -> list[tuple[int, Flow]]:
        """Return the operands of ``node`` that depend on tokens."""
        found = ((index, self.flow(value)) for index, value in enumerate(node.inputs))
        return [(index, flow) for index, flow in found if flow is not None]

    def new_layer(self) -> int:
        """Return the number of an attention that was met."""
        self.layers += 1
        return self.layers - 1

    def require_axes(
        self, node: ir.Node, index: int, neighbours: Sequence[Axis], *, shifts: bool = False
    ) -> tuple[int | None, int | None]:
        """Note that an operand of positions alone meets tokens, and prove that it may.

        Args:
            node: Node that reads the value.
            index: The operand; it does not depend on tokens.
            neighbours: Axes that its axes meet, and those in front of them.
            shifts: Whether a number may be added to a whole row of it.

        Returns:
            Its axis of new tokens and its axis of all tokens.

        Raises:
            NotIncrementalError: the axes cannot be matched, or the value would differ in a longer
                sequence.
        """
        value = g.operand(node, index)
        rows = keys = None
        dims = sizes(node, value)
        front = len(neighbours) - len(dims)
        for at, (dim, axis) in enumerate(zip(dims, neighbours[front:], strict=True)):
            if dim == 1 or (isinstance(dim, int) and not special(axis)):
                continue
            if axis == (TOKENS,) and dim == "S":
                rows = at
            elif axis == (KEYS,) and dim == "S":
                keys = at
            elif axis != (BATCH,) or dim != "B":
                raise refuse(node, f"puts an axis of {dim} of {value.name!r} beside the tokens")
        if self.proofs.varies(value):
            self.proofs.steady(node, value, rows, keys, shifts=shifts)
            batch = next((i - front for i, axis in enumerate(neighbours) if axis == (BATCH,)), None)
            self.uses.append(Use(node, index, rows, keys, batch))
        return rows, keys


def tokens_of(program: Program) -> ir.Value:
    """Return the tokens' input."""
    found = program.input(Role.TOKENS)
    assert found is not None
    return found
