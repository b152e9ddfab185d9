"""Whether a backend may own the KV cache of a decoder and write it in place."""

from __future__ import annotations

from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir.attention import AttentionOp
from llmopt.ir.landmarks import Landmark, is_landmark
from llmopt.ir.program import Program


def shared_cache_obstacle(program: Program) -> str | None:
    """Return why the KV cache cannot be updated in place, None where only Attention updates it.

    A backend that owns the buffers supports Attention masked by its attributes and by padding,
    and lengths that are known before the graph runs.
    """
    presents = (Role.PRESENT_KEY, Role.PRESENT_VALUE)
    names = {port.name for port in program.signature.outputs if port.role in presents}
    for value in (value for value in program.graph.outputs if value.name in names):
        node = value.producer()
        if node is None or not g.is_op(node, "Attention"):
            return f"{value.name!r} is not an output of Attention"
        mask = AttentionOp.of(node).mask
        if g.producer(mask) is not None and not is_landmark(mask, Landmark.PADDING_MASK):
            return f"{node.name!r} has a mask of its own"
    for node in g.nodes(program.graph, "Slice"):
        last = is_landmark(node.outputs[0], Landmark.LAST_TOKENS)
        if g.ints(node.inputs[1]) is None and not last:
            return f"{node.name!r} slices by a length that is computed in the graph"
    return None
