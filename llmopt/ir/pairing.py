"""Which node of one graph is which of another, whatever either is called.

In turns, each from what the ones before it left: nodes that compute the same from the inputs;
nodes whose results are used in the same way; nodes that are like each other beside a pair;
nodes that are like each other in the same module; and then the same once more for nodes that
have the same operator alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.ir.fingerprints import Fingerprints

Key = Callable[[Fingerprints, ir.Node], Hashable]


def pair(before: Fingerprints, after: Fingerprints) -> dict[ir.Node, ir.Node]:
    """Return the node of ``after`` for each one of ``before`` that has one."""
    return _NodePairs(before, after).run()


class _NodePairs:
    """Pairs, and what is left on both sides.

    Args:
        before: The one graph.
        after: The other.
    """

    def __init__(self, before: Fingerprints, after: Fingerprints) -> None:
        self.before, self.after = before, after
        self.pairs: dict[ir.Node, ir.Node] = {}
        self.taken: set[ir.Node] = set()

    def run(self) -> dict[ir.Node, ir.Node]:
        self._by(lambda prints, node: prints.above[node])
        self._by(lambda prints, node: prints.below[node])
        for like in (_alike, _operator):
            self._beside(like)
            self._by(_in_module(like))
            self._beside(like)
        self._by(_alike)
        return self.pairs

    def _by(self, key: Key) -> None:
        """Pair nodes that have the same key, in order."""
        waiting: dict[Hashable, list[ir.Node]] = defaultdict(list)
        for node in self.after.nodes:
            if node not in self.taken:
                waiting[key(self.after, node)].append(node)
        for node in self.before.nodes:
            if node not in self.pairs and (found := waiting.get(key(self.before, node))):
                self._join(node, found.pop(0))

    def _beside(self, key: Key) -> None:
        """Pair what stands in the same place beside a pair and has the same key."""
        open_ = list(self.pairs.items())
        while open_:
            one, other = open_.pop()
            for left, right in _neighbours(one, other):
                free = left not in self.pairs and right not in self.taken
                known = left in self.before.above and right in self.after.above
                if free and known and key(self.before, left) == key(self.after, right):
                    self._join(left, right)
                    open_.append((left, right))

    def _join(self, left: ir.Node, right: ir.Node) -> None:
        self.pairs[left] = right
        self.taken.add(right)


def _alike(prints: Fingerprints, node: ir.Node) -> Hashable:
    return prints.local[node]


def _operator(_: Fingerprints, node: ir.Node) -> Hashable:
    return (node.domain, node.op_type)


def _in_module(like: Key) -> Key:
    return lambda prints, node: (g.scope_of(node), like(prints, node))


def _neighbours(one: ir.Node, other: ir.Node) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Yield the nodes that feed both in the same place, and those that read both in the same."""
    for left, right in zip(one.inputs, other.inputs, strict=False):
        makers = [value.producer() if value is not None else None for value in (left, right)]
        if makers[0] is not None and makers[1] is not None:
            yield makers[0], makers[1]
    for mine, theirs in zip(one.outputs, other.outputs, strict=False):
        readers = {use.idx: use.node for use in theirs.uses() if _lonely(theirs, use.idx)}
        for use in mine.uses():
            if use.idx in readers and _lonely(mine, use.idx):
                yield use.node, readers[use.idx]


def _lonely(value: ir.Value, index: int) -> bool:
    """Whether one node alone reads ``value`` in this place."""
    return sum(use.idx == index for use in value.uses()) == 1
