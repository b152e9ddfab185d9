"""Mixtures that compute every expert and weigh it by its share, which is mostly zero.

::

    p, e = TopK(Softmax(x @ R), k)                         normalized or not
    share_i = ReduceSum(p * (e == i))                      or Where(e == i, p, 0); or column i of
                                                           ScatterElements(0, e, p)
    y_i = (Swish(h[:I]) * h[I:]) @ D_i, h = x @ GU_i       GU_i [H, 2 * I], D_i [I, H]
    share_0 * y_0 + share_1 * y_1 + …
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.passes.experts.mixture import VIEWS, Experts, OtherFormError, choice, gated


def weighs_experts(topk: ir.Node) -> bool:
    """Whether what is chosen is compared with numbers, or scattered, and so weighs something."""
    return any(
        (g.is_op(user, "ScatterElements") and user.inputs[1] is topk.outputs[1]) or _number(user)
        for user in g.users(topk.outputs[1])
    )


def every_expert(topk: ir.Node) -> Experts:
    """Return the mixture whose experts a node chooses.

    Raises:
        OtherFormError: It is another one.
    """
    logits, shares, normalized = choice(topk)
    count = g.static(logits, -1)
    weighed = dict(_weighed(topk, shares))
    if sorted(weighed) != list(range(count or 0)):
        raise OtherFormError(f"it weighs the experts {sorted(weighed)}, not all of {count}")
    x, gate_up, down = None, list[ir.Value](), list[ir.Value]()
    for number in range(len(weighed)):
        product, share = weighed[number]
        rows = g.operand(product, 0 if product.inputs[1] is share else 1)
        into, first, second = _feed_forward(rows)
        if x is not None and x is not into:
            raise OtherFormError(f"expert {number} reads {into.name!r}, the others {x.name!r}")
        x = into
        gate_up.append(first)
        down.append(second)
    assert x is not None
    found = Experts(
        x=x,
        logits=logits,
        k=(g.ints(topk.inputs[1]) or [0])[0],
        normalized=normalized,
        gate_up=tuple(gate_up),
        down=tuple(down),
        result=_sum([product.outputs[0] for product, _ in weighed.values()]),
    )
    _check_sizes(found)
    return found


def _check_sizes(experts: Experts) -> None:
    wide, inner = g.static(experts.x, -1), g.static(experts.down[0], 0)
    sizes = [[wide, 2 * (inner or 0)], [inner, wide]]
    if g.shape(experts.x) is None or g.rank(experts.x) != g.rank(experts.logits):
        raise OtherFormError("its sizes are not known")
    for pair in zip(experts.gate_up, experts.down, strict=True):
        if [g.shape(value) for value in pair] != sizes:
            raise OtherFormError("its experts are of different sizes")


def _number(equal: ir.Node) -> bool:
    return g.is_op(equal, "Equal") and any(g.scalar(value) is not None for value in equal.inputs)


def _weighed(topk: ir.Node, shares: ir.Value) -> Iterator[tuple[int, tuple[ir.Node, ir.Value]]]:
    """Yield each expert's number, the product that weighs what it computes, and its share."""
    for user in g.users(topk.outputs[1]):
        if g.is_op(user, "ScatterElements"):
            columns = _columns(user, shares)
        elif _number(user):
            columns = [_compared(user, shares)]
        else:
            continue
        for number, column in columns:
            share = column
            while (view := g.sole_user(share, *VIEWS)) is not None:
                share = view.outputs[0]
            product = g.sole_user(share, "Mul")
            if product is None or g.static(share, -1) != 1:
                raise OtherFormError(f"{share.name!r}, a share, does not weigh what one computes")
            yield number, (product, share)


def _compared(equal: ir.Node, shares: ir.Value) -> tuple[int, ir.Value]:
    """Return the number that choices are compared with and the sum of those shares."""
    number = next(found for v in equal.inputs if (found := g.scalar(v)) is not None)
    where = g.sole_user(equal.outputs[0], "Where")
    cast = g.sole_user(equal.outputs[0], "Cast")
    kept = where if cast is None else g.sole_user(cast.outputs[0], "Mul")
    by_where = where is not None and where.inputs[1] is shares and g.scalar(where.inputs[2]) == 0
    by_product = cast is not None and kept is not None and shares in kept.inputs
    total = g.sole_user(kept.outputs[0], "ReduceSum") if kept is not None else None
    if not (by_where or by_product) or total is None:
        raise OtherFormError(f"{equal.name!r} does not pick the share of expert {number:.0f}")
    if g.ints(g.optional(total, 1)) not in ([-1], [(g.rank(total.inputs[0]) or 0) - 1]):
        raise OtherFormError(f"{total.name!r} is not the sum over the chosen experts")
    return int(number), total.outputs[0]


def _columns(scatter: ir.Node, shares: ir.Value) -> list[tuple[int, ir.Value]]:
    """Return the number and the column of each expert where shares are scattered to zeros."""
    last = (-1, (g.rank(scatter.inputs[0]) or 0) - 1)
    plain = g.attribute(scatter, "reduction", "none") == "none" and scatter.inputs[2] is shares
    if not plain or g.attribute(scatter, "axis", 0) not in last or not _zero(scatter.inputs[0]):
        raise OtherFormError(f"{scatter.name!r} does not put shares in the place of zeros")
    found = []
    for user in g.users(scatter.outputs[0]):
        if g.is_op(user, "Split") and g.attribute(user, "axis", 0) in last:
            found += list(enumerate(user.outputs))
        elif g.is_op(user, "Gather") and g.attribute(user, "axis", 0) in last:
            number = g.scalar(user.inputs[1])
            if number is None:
                raise OtherFormError(f"{user.name!r} takes several shares at once")
            found.append((int(number), user.outputs[0]))
        elif g.is_op(user, "Slice") and g.ints(g.optional(user, 3)) in ([last[0]], [last[1]]):
            found.append(((g.ints(user.inputs[1]) or [-1])[0], user.outputs[0]))
        else:
            raise OtherFormError(f"{user.name!r} reads the shares of all experts at once")
    return found


def _feed_forward(value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return x and the weights of ``(Swish(g) * u) @ D``, g and u the halves of ``x @ GU``."""
    last = g.producer(value, "MatMul")
    if last is None:
        raise OtherFormError(f"an expert gives {value.name!r}, no product with its weights")
    first = g.producer(gated(g.operand(last, 0)), "MatMul")
    if first is None:
        raise OtherFormError(f"the gate of {last.name!r} is no product with its weights")
    return g.operand(first, 0), g.operand(first, 1), g.operand(last, 1)


def _sum(parts: list[ir.Value]) -> ir.Value:
    """Return the sum of all ``parts`` and nothing else."""
    total, wanted = parts[0], set(parts)
    while not wanted <= (found := set(_addends(total))):
        add = g.sole_user(total, "Add")
        if add is None:
            raise OtherFormError(f"{total.name!r} is not added to what the other experts give")
        total = add.outputs[0]
    if others := [value for value in found - wanted if not _zero(value)]:
        raise OtherFormError(f"{others[0].name!r} is added among what the experts give")
    return total


def _addends(value: ir.Value) -> Iterator[ir.Value]:
    add = g.producer(value, "Add")
    if add is None:
        yield value
        return
    for part in add.inputs:
        assert part is not None
        yield from _addends(part)


def _zero(value: ir.Value | None) -> bool:
    """Whether ``value`` is zeros, of whatever sizes."""
    array = g.constant(value)
    if array is not None:
        return not array.any()
    node = g.producer(value, "Expand", "ConstantOfShape", "Reshape")
    if node is None:
        return False
    if g.is_op(node, "ConstantOfShape"):
        filled = g.attribute(node, "value", None)
        return filled is None or not filled.numpy().any()
    return _zero(node.inputs[0])
