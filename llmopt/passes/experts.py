"""Find mixtures of experts: feed-forwards of which a router chooses some for each token.

What is looked for is each token's row, taken once for each expert that was chosen for it, times
the weights that were gathered for that expert::

    p, e = TopK(Softmax(x @ R), k)  [p = p / ReduceSum(p)]     or p = Softmax(p) of TopK(x @ R)
    h = Gather(GU, e) @ x                                      GU [E, 2 * I, H]
    y = Gather(D, e) @ (Swish(h[:I]) * h[I:])                  D [E, H, I]
    ReduceSum(p * y)                                           over the k experts
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.ir.program import Program

_BEFORE_CHOICE: Final = ("Softmax", "Sigmoid", "Add", "Cast")
_VIEWS: Final = ("Reshape", "Unsqueeze", "Squeeze", "Flatten")


@dataclass(frozen=True)
class Experts:
    """A mixture of gated experts.

    Args:
        topk: The node that chooses.
        x: [N, H], a row for each token.
        logits: [N, E], what the choice is made by.
        k: How many are chosen.
        normalized: Whether the shares of those that are chosen add up to one.
        gate_up: [E, 2 * I, H]; the gates are the first I rows.
        down: [E, H, I].
        gathers: The nodes that gather the two.
        result: [N, H].
    """

    topk: ir.Node
    x: ir.Value
    logits: ir.Value
    k: int
    normalized: bool
    gate_up: ir.Value
    down: ir.Value
    gathers: tuple[ir.Node, ir.Node]
    result: ir.Value


@dataclass(frozen=True)
class _Applied:
    """What ``Gather(weight, indices) @ rows`` is made of.

    Args:
        gather: The node that gathers.
        weight: [E, out, in].
        indices: Which expert each row is for.
        rows: [N * k, in].
    """

    gather: ir.Node
    weight: ir.Value
    indices: ir.Value
    rows: ir.Value


class _OtherFormError(Exception):
    """What was found is no mixture of this form, for the reason it says."""


def find_experts(program: Program) -> Iterator[tuple[ir.Node, Experts | str]]:
    """Yield each node that chooses experts, and the mixture or why it is another one."""
    for topk in g.nodes(program.graph, "TopK"):
        if _chooses(topk):
            try:
                yield topk, _experts(topk)
            except _OtherFormError as error:
                yield topk, str(error)


def routers(program: Program) -> set[ir.Node]:
    """Return the products that say which experts a token goes to."""
    found = set()
    for topk in g.nodes(program.graph, "TopK"):
        step: ir.Node | None = topk if _chooses(topk) else None
        while g.is_op(step, "TopK", *_BEFORE_CHOICE, *_VIEWS):
            assert step is not None
            step = g.producer(step.inputs[0])
        if step is not None and g.is_op(step, "MatMul"):
            found.add(step)
    return found


def _chooses(topk: ir.Node) -> bool:
    """Whether matrices are gathered by what is chosen."""
    values = [topk.outputs[1]]
    while values:
        for user in g.users(values.pop()):
            if g.is_op(user, "Gather", "GatherND") and g.rank(user.inputs[0]) == 3:
                return True
            if g.is_op(user, *_VIEWS):
                values.append(user.outputs[0])
    return False


def _experts(topk: ir.Node) -> Experts:
    logits, shares, normalized = _choice(topk)
    k = (g.ints(topk.inputs[1]) or [0])[0]
    rows, result = _sum(shares, k)
    down = _applied(rows)
    up = _applied(_gated(down.rows))
    found = Experts(
        topk=topk,
        x=_repeated(up.rows, k),
        logits=logits,
        k=k,
        normalized=normalized,
        gate_up=up.weight,
        down=down.weight,
        gathers=(up.gather, down.gather),
        result=result,
    )
    if any(_unviewed(each.indices) is not topk.outputs[1] for each in (up, down)):
        raise _OtherFormError("its experts are gathered by something other than what was chosen")
    _check_sizes(found)
    return found


def _check_sizes(found: Experts) -> None:
    inner, sizes = g.static(found.down, 2), [g.shape(found.gate_up), g.shape(found.down)]
    experts, wide = g.static(found.logits, 1), g.static(found.x, 1)
    if g.rank(found.logits) != 2 or g.rank(found.x) != 2 or inner is None:
        raise _OtherFormError("its sizes are not known")
    if sizes != [[experts, 2 * inner, wide], [experts, wide, inner]]:
        raise _OtherFormError(f"its weights are {sizes}, not one pair for each expert")


def _choice(topk: ir.Node) -> tuple[ir.Value, ir.Value, bool]:
    """Return the logits, the shares of those chosen, and whether these add up to one."""
    last = (-1, (g.rank(topk.inputs[0]) or 0) - 1)
    if g.attribute(topk, "axis", -1) not in last or g.attribute(topk, "largest", 1) != 1:
        raise _OtherFormError("it does not take the largest of the last axis")
    shares = topk.outputs[0]
    after = g.sole_user(shares, "Softmax")
    before = g.producer(topk.inputs[0], "Softmax")
    softmax = after if before is None else before
    if softmax is None or g.attribute(softmax, "axis", -1) not in last:
        raise _OtherFormError("the shares of its experts are no softmax")
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
        raise _OtherFormError(f"its shares are divided by {total.name!r}, which is not their sum")
    assert share is not None
    return logits, share.outputs[0], True


def _sum(shares: ir.Value, k: int) -> tuple[ir.Value, ir.Value]:
    """Return what the shares weigh, [N * k, H], and the sum over the experts, [N, H]."""
    value = shares
    while (view := g.sole_user(value, *_VIEWS)) is not None:
        value = view.outputs[0]
    product = g.sole_user(value, "Mul")
    if product is None or g.static(value, -1) != 1 or g.rank(value) != 2:
        raise _OtherFormError(f"its shares {value.name!r} do not weigh a row for each expert")
    rows = g.operand(product, 0 if product.inputs[1] is value else 1)
    split = g.sole_user(product.outputs[0], "Reshape")
    total = g.sole_user(split.outputs[0], "ReduceSum") if split is not None else None
    if split is None or total is None:
        raise _OtherFormError(f"what {product.name!r} weighs is not summed")
    by_token = g.rank(split.outputs[0]) == 3 and g.static(split.outputs[0], 1) == k
    axes, kept = g.ints(g.optional(total, 1)), g.attribute(total, "keepdims", 1)
    if not by_token or axes not in ([1], [-2]) or kept:
        raise _OtherFormError(f"{total.name!r} is not the sum over the {k} experts of a token")
    return rows, total.outputs[0]


def _applied(value: ir.Value) -> _Applied:
    """Return what ``Squeeze(Gather(W, e) @ Unsqueeze(rows, -1), -1)`` is made of."""
    squeeze = g.producer(value, "Squeeze", "Reshape")
    product = g.producer(squeeze.inputs[0], "MatMul") if squeeze is not None else None
    if product is None or g.static(product.outputs[0], -1) != 1 or g.rank(value) != 2:
        raise _OtherFormError(f"{value.name!r} is no product of a row with an expert's weights")
    gather = g.producer(product.inputs[0], "Gather", "GatherND")
    column = g.producer(product.inputs[1], "Unsqueeze", "Reshape")
    if gather is None or column is None or g.rank(column.inputs[0]) != 2:
        raise _OtherFormError(
            f"{product.name!r} is no product of gathered weights [E, out, in] with a row"
        )
    whole = g.attribute(gather, "axis", 0) == 0 == g.attribute(gather, "batch_dims", 0)
    if not whole or g.rank(gather.outputs[0]) != 3:
        raise _OtherFormError(f"{gather.name!r} does not gather whole experts")
    return _Applied(gather, g.operand(gather, 0), g.operand(gather, 1), g.operand(column, 0))


def _gated(value: ir.Value) -> ir.Value:
    """Return h of ``Swish(h[:, :I]) * h[:, I:]``."""
    product = g.producer(value, "Mul")
    swish = g.producer(product.inputs[0], "Swish") if product is not None else None
    other = product.inputs[1] if product is not None else None
    if product is not None and swish is None:
        swish, other = g.producer(product.inputs[1], "Swish"), product.inputs[0]
    if swish is None or g.attribute(swish, "alpha", 1.0) != 1.0:
        raise _OtherFormError(f"its experts compute {value.name!r}, not Swish(gate) * up")
    split = g.producer(swish.inputs[0], "Split")
    if split is None or len(split.outputs) != 2 or g.attribute(split, "axis", 0) not in (1, -1):
        raise _OtherFormError(f"the gate {swish.name!r} is no half of a product")
    gate, up = split.outputs
    halves = g.static(gate, 1) is not None and g.static(gate, 1) == g.static(up, 1)
    if swish.inputs[0] is not gate or other is not up or not halves:
        raise _OtherFormError(f"the halves of {split.name!r} are not gate and up")
    return g.operand(split, 0)


def _repeated(value: ir.Value, k: int) -> ir.Value:
    """Return x [N, H] of which ``value`` [N * k, H] has each row k times in turn."""
    flat = g.producer(value, "Reshape")
    expand = g.producer(flat.inputs[0], "Expand") if flat is not None else None
    lifted = g.producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if lifted is None or expand is None or g.ints(lifted.inputs[1]) not in ([1], [-2]):
        raise _OtherFormError(
            f"{value.name!r} is not each token's row, once for each of its experts"
        )
    if g.rank(lifted.inputs[0]) != 2 or g.static(expand.outputs[0], 1) != k:
        raise _OtherFormError(f"{expand.name!r} does not give {k} rows to each token")
    return g.operand(lifted, 0)


def _unviewed(value: ir.Value) -> ir.Value:
    """Look past what only changes the shape."""
    node = g.producer(value, *_VIEWS)
    return value if node is None else _unviewed(g.operand(node, 0))
