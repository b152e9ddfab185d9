"""Whether a decoder keeps its keys and values the way a backend's own caches need it."""

from __future__ import annotations

from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir.attention import AttentionOp
from llmopt.ir.landmarks import Landmark, is_landmark
from llmopt.ir.program import Program


def cache_left_out(program: Program) -> str | None:
    """Return why caches cannot be written in place, None if they can: Attention keeps them all.

    A backend that owns the buffers of a cache knows Attention alone, masked by what its
    attributes say and by padding, and rows that are counted before it runs.
    """
    presents = (Role.PRESENT_KEY, Role.PRESENT_VALUE)
    names = {port.name for port in program.signature.outputs if port.role in presents}
    for value in (value for value in program.graph.outputs if value.name in names):
        node = value.producer()
        if node is None or not g.is_op(node, "Attention"):
            return f"{value.name!r} is written by no Attention"
        mask = AttentionOp.of(node).mask
        if g.producer(mask) is not None and not is_landmark(mask, Landmark.PADDING_MASK):
            return f"{node.name!r} has a mask of its own"
    for node in g.nodes(program.graph, "Slice"):
        last = is_landmark(node.outputs[0], Landmark.LAST_TOKENS)
        if g.ints(node.inputs[1]) is None and not last:
            return f"{node.name!r} cuts rows that are counted while it runs"
    return None
