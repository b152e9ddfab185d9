"""What a mixture of experts is, and what all of its forms have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from llmopt.ir import graph as g

VIEWS: Final = ("Reshape", "Unsqueeze", "Squeeze", "Flatten")


@dataclass(frozen=True)
class Experts:
    """A mixture of gated experts.

    Args:
        x: [N, H] or [B, S, H], a row for each token.
        logits: [N, E] or [B, S, E], what the choice is made by.
        k: Number of experts chosen for each token.
        normalized: Whether the shares of those that are chosen add up to one.
        gate_up: A value [E, 2 * I, H], or [H, 2 * I] for each expert; gates come first.
        down: A value [E, H, I], or [I, H] for each expert.
        result: Output of the mixture, of the shape of ``x``.
        gathers: The nodes that gather the two, where there is one value of each.
    """

    x: ir.Value
    logits: ir.Value
    k: int
    normalized: bool
    gate_up: tuple[ir.Value, ...]
    down: tuple[ir.Value, ...]
    result: ir.Value
    gathers: tuple[ir.Node, ...] = ()

    @property
    def count(self) -> int:
        """How many experts there are."""
        return g.static(self.logits, -1) or 0


class OtherFormError(Exception):
    """What was found is no mixture of this form, for the reason it says."""


def choice(topk: ir.Node) -> tuple[ir.Value, ir.Value, bool]:
    """Return the logits, the shares of those chosen, and whether these add up to one."""
    last = (-1, (g.rank(topk.inputs[0]) or 0) - 1)
    if g.attribute(topk, "axis", -1) not in last or g.attribute(topk, "largest", 1) != 1:
        raise OtherFormError("it does not take the largest of the last axis")
    shares = topk.outputs[0]
    after = g.sole_user(shares, "Softmax")
    before = g.producer(topk.inputs[0], "Softmax")
    softmax = after if before is None else before
    if softmax is None or g.attribute(softmax, "axis", -1) not in last:
        raise OtherFormError("the shares of its experts are no softmax")
    if before is None:
        return g.operand(topk, 0), softmax.outputs[0], True
    logits = g.operand(softmax, 0)
    readers = g.users(shares)
    total = next((node for node in readers if g.is_op(node, "ReduceSum")), None)
    if total is None:
        return logits, shares, False
    share = g.sole_user(total.outputs[0], "Div")
    whole = {*readers} == {total, share} and share is not None and share.inputs[0] is shares
    if not whole or g.ints(g.optional(total, 1)) not in ([-1], [last[1]]):
        raise OtherFormError(f"its shares are divided by {total.name!r}, which is not their sum")
    assert share is not None
    return logits, share.outputs[0], True


def gated(value: ir.Value) -> ir.Value:
    """Return h of ``Swish(h[..., :I]) * h[..., I:]``."""
    product = g.producer(value, "Mul")
    swish = g.producer(product.inputs[0], "Swish") if product is not None else None
    other = product.inputs[1] if product is not None else None
    if product is not None and swish is None:
        swish, other = g.producer(product.inputs[1], "Swish"), product.inputs[0]
    if swish is None or g.attribute(swish, "alpha", 1.0) != 1.0:
        raise OtherFormError(f"its experts compute {value.name!r}, not Swish(gate) * up")
    split = g.producer(swish.inputs[0], "Split")
    if split is None or len(split.outputs) != 2 or not _on_last(split):
        raise OtherFormError(f"the gate {swish.name!r} is no half of a product")
    gate, up = split.outputs
    halves = g.static(gate, -1) is not None and g.static(gate, -1) == g.static(up, -1)
    if swish.inputs[0] is not gate or other is not up or not halves:
        raise OtherFormError(f"the halves of {split.name!r} are not gate and up")
    return g.operand(split, 0)


def unviewed(value: ir.Value) -> ir.Value:
    """Look past what only changes the shape."""
    node = g.producer(value, *VIEWS)
    return value if node is None else unviewed(g.operand(node, 0))


def _on_last(node: ir.Node) -> bool:
    """Whether a node works along the last axis of what it reads."""
    return g.attribute(node, "axis", 0) in (-1, (g.rank(node.inputs[0]) or 0) - 1)
