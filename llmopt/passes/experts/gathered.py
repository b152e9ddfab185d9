"""Mixtures that gather the weights of those experts that were chosen.

What is looked for is each token's row, taken once for each expert that was chosen for it, times
the weights that were gathered for that expert::

    p, e = TopK(Softmax(x @ R), k)  [p = p / ReduceSum(p)]     or p = Softmax(p) of TopK(x @ R)
    h = Gather(GU, e) @ x                                      GU [E, 2 * I, H]
    y = Gather(D, e) @ (Swish(h[:I]) * h[I:])                  D [E, H, I]
    ReduceSum(p * y)                                           over the k experts
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.passes.experts.mixture import (
    VIEWS,
    Experts,
    OtherFormError,
    choice,
    gated,
    unviewed,
)


@dataclass(frozen=True)
class _Applied:
    """What ``Gather(weight, indices) @ rows`` is made of.

    Args:
        gather: The node that gathers.
        weight: [E, out, in].
        indices: Indices of the expert of each row.
        rows: [.., in], a row for each expert of each token.
    """

    gather: ir.Node
    weight: ir.Value
    indices: ir.Value
    rows: ir.Value


def gathered(topk: ir.Node) -> bool:
    """Whether matrices are gathered by what is chosen."""
    values = [topk.outputs[1]]
    while values:
        for user in g.users(values.pop()):
            if g.is_op(user, "Gather", "GatherND") and g.rank(user.inputs[0]) == 3:
                return True
            if g.is_op(user, *VIEWS):
                values.append(user.outputs[0])
    return False


def gathered_experts(topk: ir.Node) -> Experts:
    """Return the mixture whose experts a node chooses.

    Raises:
        OtherFormError: It is another one.
    """
    logits, shares, normalized = choice(topk)
    k = (g.ints(topk.inputs[1]) or [0])[0]
    rows, result = _sum(shares, k)
    down = _applied(rows)
    up = _applied(gated(down.rows))
    found = Experts(
        x=_repeated(up.rows, k),
        logits=logits,
        k=k,
        normalized=normalized,
        gate_up=(up.weight,),
        down=(down.weight,),
        gathers=(up.gather, down.gather),
        result=result,
    )
    if any(unviewed(each.indices) is not topk.outputs[1] for each in (up, down)):
        raise OtherFormError("its experts are gathered by something other than what was chosen")
    _check_sizes(found)
    return found


def _check_sizes(mixture: Experts) -> None:
    inner, sizes = g.static(mixture.down[0], 2), [*map(g.shape, (*mixture.gate_up, *mixture.down))]
    experts, wide = g.static(mixture.logits, 1), g.static(mixture.x, 1)
    if g.rank(mixture.logits) != 2 or g.rank(mixture.x) != 2 or inner is None:
        raise OtherFormError("its sizes are not known")
    if sizes != [[experts, 2 * inner, wide], [experts, wide, inner]]:
        raise OtherFormError(f"its weights are {sizes}, not one pair for each expert")


def _sum(shares: ir.Value, k: int) -> tuple[ir.Value, ir.Value]:
    """Return what the shares weigh, a row for each expert of each token, and the sum, [N, H]."""
    value = shares
    while (view := g.sole_user(value, *VIEWS)) is not None:
        value = view.outputs[0]
    product = g.sole_user(value, "Mul")
    if product is None or g.static(value, -1) != 1:
        raise OtherFormError(f"its shares {value.name!r} do not weigh a row for each expert")
    rows, weighed = g.operand(product, 0 if product.inputs[1] is value else 1), product.outputs[0]
    if (split := g.sole_user(weighed, *VIEWS)) is not None:
        weighed = split.outputs[0]
    total = g.sole_user(weighed, "ReduceSum")
    if total is None:
        raise OtherFormError(f"what {product.name!r} weighs is not summed")
    by_token = g.rank(weighed) == 3 and g.static(weighed, 1) == k
    axes, kept = g.ints(g.optional(total, 1)), g.attribute(total, "keepdims", 1)
    if not by_token or axes not in ([1], [-2]) or kept:
        raise OtherFormError(f"{total.name!r} is not the sum over the {k} experts of a token")
    return rows, total.outputs[0]


def _applied(value: ir.Value) -> _Applied:
    """Return what ``Gather(W, e) @ rows`` is made of, whatever reshapes are around it."""
    product = g.producer(unviewed(value), "MatMul")
    if product is None or g.static(product.outputs[0], -1) != 1:
        raise OtherFormError(f"{value.name!r} is no product of a row with an expert's weights")
    gather = g.producer(product.inputs[0], "Gather", "GatherND")
    column = g.operand(product, 1)
    if gather is None or g.rank(column) != 3:
        raise OtherFormError(
            f"{product.name!r} is no product of gathered weights [E, out, in] with a row"
        )
    whole = g.attribute(gather, "axis", 0) == 0 == g.attribute(gather, "batch_dims", 0)
    if not whole or g.rank(gather.outputs[0]) != 3:
        raise OtherFormError(f"{gather.name!r} does not gather whole experts")
    rows, weight = unviewed(column), g.operand(gather, 0)
    sizes = [g.static(weight, 1), g.static(weight, 2)]
    if None in sizes or sizes != [g.static(value, -1), g.static(rows, -1)]:
        raise OtherFormError(f"{product.name!r} does not multiply whole rows")
    return _Applied(gather, weight, g.operand(gather, 1), rows)


def _repeated(value: ir.Value, k: int) -> ir.Value:
    """Return x [N, H] of which ``value`` [N, k, H] has each row k times."""
    expand = g.producer(value, "Expand")
    lifted = g.producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if lifted is None or expand is None or g.ints(lifted.inputs[1]) not in ([1], [-2]):
        raise OtherFormError(
            f"{value.name!r} is not each token's row, once for each of its experts"
        )
    if g.rank(lifted.inputs[0]) != 2 or g.static(value, 1) != k:
        raise OtherFormError(f"{expand.name!r} does not give {k} rows to each token")
    return g.operand(lifted, 0)
