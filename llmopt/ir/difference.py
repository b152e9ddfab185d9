"""What changed from one graph to another: operators, attributes, weights, inputs and outputs.

Other names and another order are no change. Two graphs without a difference compute the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes import common

from llmopt.ir import graph as g
from llmopt.ir import wording
from llmopt.ir.fingerprints import Digest, Fingerprints, content
from llmopt.ir.match import COMMUTATIVE
from llmopt.ir.pairing import pair

Kind = Literal["removed", "added", "changed"]


@dataclass(frozen=True)
class NodeChange:
    """One node that is not what it was.

    Args:
        kind: ``"removed"``, ``"added"`` or ``"changed"``.
        scope: The module that it is of: ``"layers.0.self_attn"``.
        operator: The operator, with its domain if that is not ONNX's own.
        details: The facts that differ, or the attributes of a node that was added or removed.
        node: The node's name before; after, for one that was added.
        component: The part of the model, where it has several.
        node_after: The node's name after; empty for one that was removed.
    """

    kind: Kind
    scope: str
    operator: str
    details: tuple[str, ...]
    node: str
    component: str = ""
    node_after: str = ""


@dataclass(frozen=True)
class Weights:
    """The weights of both sides, each digest once.

    Args:
        before: The number before.
        after: The number after.
        same: The number of weights that are on both sides, by digest.
        before_bytes: The size before.
        after_bytes: The size after.
    """

    before: int = 0
    after: int = 0
    same: int = 0
    before_bytes: int = 0
    after_bytes: int = 0

    def plus(self, other: Weights) -> Weights:
        """Return the sum with those of another part."""
        return Weights(*(a + b for a, b in zip(self.numbers(), other.numbers(), strict=True)))

    def numbers(self) -> tuple[int, ...]:
        """Return all numbers in order."""
        return (self.before, self.after, self.same, self.before_bytes, self.after_bytes)


@dataclass(frozen=True)
class Difference:
    """What changed.

    Args:
        edges: Changed inputs, outputs and operator sets, and facts of artifacts, a line each.
        changes: Changed nodes.
        operators: The number of nodes of each operator, before and after.
        weights: The number of weights, and of those that stayed.
    """

    edges: tuple[str, ...] = ()
    changes: tuple[NodeChange, ...] = ()
    operators: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    weights: Weights = field(default_factory=Weights)

    @property
    def equal(self) -> bool:
        """Whether nothing changed."""
        return not self.edges and not self.changes

    def nodes(self, *kinds: Kind) -> tuple[str, ...]:
        """Return the names of nodes that changed in one of these ways."""
        return tuple(change.node for change in self.changes if change.kind in kinds)

    @property
    def nodes_before(self) -> set[str]:
        """The names of every node of the first graph that is no longer what it was."""
        return {*self.nodes("removed", "changed")}

    @property
    def nodes_after(self) -> set[str]:
        """The names of every node of the second graph that was not so in the first."""
        return {change.node_after for change in self.changes if change.kind != "removed"}


def difference(
    before: Mapping[str, ir.Model], after: Mapping[str, ir.Model], digest: Digest = content
) -> Difference:
    """Return what changed between the components of two models.

    Args:
        before: Models by the name of the component.
        after: Models by the name of the component.
        digest: The function that gives weights their digest: by their numbers, or by how they
            are made, which is enough for two states of one Program and reads no large ones.

    Raises:
        LlmoptError: A weight cannot be read.
    """
    edges: list[str] = []
    changes: list[NodeChange] = []
    counts: list[Counter[str]] = [Counter(), Counter()]
    weights = Weights()
    for name in dict.fromkeys([*before, *after]):
        label = name if len({*before, *after}) > 1 else ""
        if name not in before or name not in after:
            edges.append(f"component {name} {'removed' if name in before else 'added'}")
            continue
        sides = [Fingerprints.of(_inlined(side[name]), digest) for side in (before, after)]
        comparison = _Comparison(sides[0], sides[1], label)
        lines, changed = [*comparison.edges()], comparison.changes()
        if not lines and not changed and not comparison.computes_the_same():
            lines.append("the outputs are computed otherwise, though every node has a like one")
        edges += [f"{label}: {line}" if label else line for line in lines]
        changes += changed
        weights = weights.plus(comparison.weights())
        for count, prints in zip(counts, sides, strict=True):
            count.update(operator(node) for node in prints.nodes)
    operators = {name: (counts[0][name], counts[1][name]) for name in sorted(counts[0] | counts[1])}
    return Difference(tuple(edges), tuple(changes), operators, weights)


def operator(node: ir.Node) -> str:
    """Return the operator of a node, with a domain that is not ONNX's own."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _inlined(model: ir.Model) -> ir.Model:
    if not model.functions:
        return model
    copy = model.clone()
    common.InlinePass()(copy)
    return copy


class _Comparison:
    """Two graphs and which node of one is which of the other."""

    def __init__(self, before: Fingerprints, after: Fingerprints, component: str) -> None:
        self.before, self.after = before, after
        self.component = component
        self.pairs = pair(self.before, self.after)
        self.back = {new: old for old, new in self.pairs.items()}

    def changes(self) -> list[NodeChange]:
        """Return changed nodes in the order of the graphs."""
        placed: list[tuple[float, NodeChange]] = []
        for index, node in enumerate(self.before.nodes):
            change = self._change_of(node)
            if change is not None:
                placed.append((index / len(self.before.nodes), change))
        for index, node in enumerate(self.after.nodes):
            if node not in self.back:
                added = self._change(
                    "added", node, wording.spelled_out(self.after.attributes(node))
                )
                placed.append(
                    (index / len(self.after.nodes), replace(added, node_after=added.node))
                )
        return [change for _, change in sorted(placed, key=lambda each: each[0])]

    def _change_of(self, node: ir.Node) -> NodeChange | None:
        """Return what became of a node of the first graph, if anything did."""
        new = self.pairs.get(node)
        if new is None:
            return self._change("removed", node, wording.spelled_out(self.before.attributes(node)))
        if self.before.above[node] == self.after.above[new]:
            return None
        details = tuple(self._details(node, new))
        if not details:
            return None
        return replace(self._change("changed", node, details), node_after=str(new.name))

    def _change(self, kind: Kind, node: ir.Node, details: tuple[str, ...]) -> NodeChange:
        name = str(node.name)
        return NodeChange(kind, g.scope_of(node), operator(node), details, name, self.component)

    def _details(self, old: ir.Node, new: ir.Node) -> Iterator[str]:
        """Yield what is different in a pair; what only follows from other nodes is not."""
        yield from wording.attributes(self.before.attributes(old), self.after.attributes(new))
        if len(old.outputs) != len(new.outputs):
            yield f"{len(old.outputs)} → {len(new.outputs)} outputs"
        yield from self._operands(old, new)
        for index, (mine, theirs) in enumerate(zip(old.outputs, new.outputs, strict=False)):
            if not wording.fits(mine, theirs):
                yield f"output {index} {wording.type_of(mine)} → {wording.type_of(theirs)}"

    def _operands(self, old: ir.Node, new: ir.Node) -> Iterator[str]:
        mine, theirs = ([*node.inputs] for node in (old, new))
        count = max(len(mine), len(theirs))
        mine, theirs = (side + [None] * (count - len(side)) for side in (mine, theirs))
        straight = [*self._compared(mine, theirs)]
        if straight and old.op_type in COMMUTATIVE and count == 2:
            straight = min(straight, [*self._compared(mine, theirs[::-1])], key=len)
        yield from straight

    def _compared(
        self, mine: list[ir.Value | None], theirs: list[ir.Value | None]
    ) -> Iterator[str]:
        for index, (left, right) in enumerate(zip(mine, theirs, strict=True)):
            if (told := self._operand(left, right)) is not None:
                yield f"operand {index} {told}"

    def _operand(self, left: ir.Value | None, right: ir.Value | None) -> str | None:
        """Return what is different in an operand, or None; or where another node tells it."""
        held = self.before.digest_of(left), self.after.digest_of(right)
        if held != (None, None):
            return None if held[0] == held[1] else wording.numbers(left, right)
        if left is None or right is None:
            return None if left is right else _instead(left, right)
        old, new = left.producer(), right.producer()
        if self.before.values.get(left) == self.after.values.get(right):
            return None
        if old is None and new is None:
            return f"{left.name} → {right.name}" if self._both_have(left, right) else None
        told = (old is not None and old not in self.pairs, new is not None and new not in self.back)
        if any(told) or (old is not None and self._is_same(old, left, right)):
            return None
        return _instead(left, right)

    def _is_same(self, old: ir.Node, left: ir.Value, right: ir.Value) -> bool:
        """Whether both values are the same output of one pair."""
        new = self.pairs[old]
        return right.producer() is new and left.index() == right.index()

    def _both_have(self, left: ir.Value, right: ir.Value) -> bool:
        """Whether both graphs have both inputs: else that is the change."""
        names = [{v.name for v in side.graph.inputs} for side in (self.before, self.after)]
        return {left.name, right.name} <= names[0] & names[1]

    def edges(self) -> Iterator[str]:
        symbols: dict[str, str] = {}
        old, new = self.before.graph, self.after.graph
        yield from wording.ports("input", old.inputs, new.inputs, symbols)
        yield from wording.ports("output", old.outputs, new.outputs, symbols)
        yield from wording.defaults(old.inputs, new.inputs)
        for name in sorted({*self.before.imports} & {*self.after.imports}):
            versions = self.before.imports[name], self.after.imports[name]
            if versions[0] != versions[1]:
                yield f"opset {name or 'ai.onnx'} {versions[0]} → {versions[1]}"
        yield from self._rerouted()

    def _rerouted(self) -> Iterator[str]:
        """Yield outputs of both that come from nodes which both still have, but other ones."""
        theirs = {value.name: value for value in self.after.graph.outputs}
        for value in self.before.graph.outputs:
            other = theirs.get(value.name)
            if other is not None and (told := self._operand(value, other)) is not None:
                yield f"output {value.name} {told}"

    def computes_the_same(self) -> bool:
        """Whether every output is made in the same way, by what its value is known by."""
        sides = [
            {
                str(v.name): prints.digest_of(v) or prints.values.get(v, str(v.name))
                for v in prints.graph.outputs
            }
            for prints in (self.before, self.after)
        ]
        return sides[0] == sides[1]

    def weights(self) -> Weights:
        sides = [dict(_weights(prints)) for prints in (self.before, self.after)]
        same = len(sides[0].keys() & sides[1].keys())
        sizes = [sum(side.values()) for side in sides]
        return Weights(len(sides[0]), len(sides[1]), same, *sizes)


def _instead(left: ir.Value | None, right: ir.Value | None) -> str:
    """Return what an operand was and is; a node by its operator, which layers have alike."""
    made = [None if value is None else value.producer() for value in (left, right)]
    names = [operator(node) if node is not None else "" for node in made]
    told = [
        f"of {name}" if name else wording.source(value)
        for name, value in zip(names, (left, right), strict=True)
    ]
    alike = names[0] and names[0] == names[1]
    return f"{told[0]} → of another {names[1]}" if alike else " → ".join(told)


def _weights(prints: Fingerprints) -> Iterator[tuple[str, int]]:
    """Yield digest and bytes of every weight that a node reads."""
    for node in prints.nodes:
        for value in node.inputs:
            if value is not None and (digest := prints.digest_of(value)) is not None:
                tensor = ir.convenience.get_const_tensor(value)
                yield digest, 0 if tensor is None else tensor.nbytes
