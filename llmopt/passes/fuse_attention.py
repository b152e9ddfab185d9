"""Recognize scaled dot-product attention that is written out.

Rewrites::

    Softmax(scale * Q @ K^T  [softcap]  [+ mask, or Where(mask, ., -inf)]) @ V
    into    Attention(Q, K, V, mask)  on [batch, heads, tokens, width]

Where Q, K and V are [batch * heads, tokens, width], each is one head of a sequence of its own.
``raise-attention`` then gives it the dialect's form, whichever way it was spelled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir.attention import AttentionAttributes
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass

FORBIDDEN: Final = -1e4  # a score this low has no weight after softmax: a mask, not a bias


@dataclass(frozen=True)
class Scores:
    """What a softmax is taken of: ``cap * tanh(scale * Q @ K^T / cap) + masks``.

    Args:
        q: [B, H, S, D], or [N, S, D].
        k: K transposed, [B, G, D, T]; or K itself, [B, G, T, D], if it is ``transposed``. Or of as
            many axes as ``q``.
        turned: Whether the transpose was taken off K.
        scale: Factor of the products.
        softcap: Bound of the scores; 0 is none.
        masks: Masks applied afterwards, each a value and its meaning: ``"keep"`` (bool, True
            attends), ``"drop"`` (bool, True does not) or ``"add"``.
    """

    q: ir.Value
    k: ir.Value
    transposed: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    masks: tuple[tuple[str, ir.Value], ...] = ()


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Fuse written-out attention into one Attention operator.

    Numerics: the same formula; within 1e-5 relative in float32. A query that may attend to
    nothing gives zeros or an average, where the written-out form gives NaN or an average.
    Scope: the graph. Leaves: scores of other ranks than 3 and 4, weights that are read
    elsewhere, and whatever else stands between the product and the softmax, by name.
    """

    name: ClassVar[str] = "fuse-attention"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for softmax in g.nodes(program.graph, "Softmax"):
            if (g.rank(softmax.inputs[0]) or 3) < 3:
                continue  # one row of scores for each token: a router's choice, no attention
            scores = find_scores(g.operand(softmax, 0))
            product = _weighted_sum(softmax)
            if isinstance(scores, str):
                outcome.miss(softmax, scores, "attention")
            elif isinstance(product, str):
                outcome.miss(softmax, product, "attention")
            elif (reason := _obstacle(scores, g.operand(product, 1))) is not None:
                outcome.miss(softmax, reason, "attention")
            else:
                _fuse(scores, product, softmax)
                outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


def find_scores(value: ir.Value) -> Scores | str:
    """Return what the scores ``value`` are made of, or why they are not attention scores."""
    node = value.producer()
    if node is None:
        return f"its scores {value.name!r} are an input"
    step = _STEPS.get(node.op_type)
    if step is None:
        return f"its scores pass through {node.op_type} {node.name!r}"
    return step(node)


def _product(node: ir.Node) -> Scores | str:
    q, kt = g.operand(node, 0), g.operand(node, 1)
    if g.rank(q) not in (3, 4) or g.rank(kt) != g.rank(q):
        return f"its scores {node.name!r} are of rank {g.rank(q)}, not [batch, heads, S, T]"
    q, q_factor = _peel(q)
    k, outer = _peel(kt)
    transpose = g.producer(k, "Transpose")
    swapped = [0, 1, 3, 2] if g.rank(kt) == 4 else [0, 2, 1]
    transposed = transpose is not None and [*g.attribute(transpose, "perm", ())] == swapped
    if transpose is None or not transposed:
        return Scores(q, k, transposed=False, scale=q_factor * outer)
    k, inner = _peel(g.operand(transpose, 0))
    return Scores(q, k, transposed=True, scale=q_factor * outer * inner)


def _obstacle(scores: Scores, v: ir.Value) -> str | None:
    """Return why Attention would compute something else, or None."""
    q, k, v_sizes = g.shape(scores.q), g.shape(scores.k), g.shape(v)
    if q is None or k is None or v_sizes is None or scores.q.dtype is None:
        return "the sizes of Q, K or V are not known"
    if len(v_sizes) != len(q):
        return f"V is {v_sizes}, not [batch, heads, T, width]"
    several = len(q) == 4
    if _differ(q[0], k[0]) or _differ(k[0], v_sizes[0]) or (several and _differ(k[1], v_sizes[1])):
        return f"its Q {q[:2]}, K {k[:2]} and V {v_sizes[:2]} differ in batch or heads"
    if scores.scale <= 0 or scores.softcap < 0:
        return f"its scale {scores.scale:g} or cap {scores.softcap:g} is not positive"
    for _, mask in scores.masks:
        sizes = g.shape(mask)
        if sizes is None or not 2 <= len(sizes) <= len(q) or sizes[-1] == 1:
            return f"its mask {mask.name!r} is {sizes}, not [..., S, T]"
    return None


def _peel(value: ir.Value) -> tuple[ir.Value, float]:
    """Take a constant factor off Q or K: torch multiplies both by the root of the scale."""
    node = g.producer(value, "Mul", "Div")
    if node is None:
        return value, 1.0
    factor = g.scalar(node.inputs[1])
    if factor is not None:
        return g.operand(node, 0), factor if node.op_type == "Mul" else 1.0 / factor
    factor = g.scalar(node.inputs[0])
    return (
        (g.operand(node, 1), factor)
        if factor is not None and node.op_type == "Mul"
        else (value, 1.0)
    )


def _differ(a: g.Dim, b: g.Dim) -> bool:
    """Whether two sizes are known to differ: an unknown one may be any but 1."""
    return a != b and ((isinstance(a, int) and isinstance(b, int)) or 1 in (a, b))


def _scaled(node: ir.Node) -> Scores | str:
    factor = g.scalar(node.inputs[1])
    inner = g.operand(node, 0)
    if factor is None and node.op_type == "Mul":
        factor, inner = g.scalar(node.inputs[0]), g.operand(node, 1)
    if factor is None or factor == 0.0:
        return f"its scores are scaled by no constant in {node.name!r}"
    factor = factor if node.op_type == "Mul" else 1.0 / factor
    if (tanh := g.producer(inner, "Tanh")) is not None:
        return _capped(tanh, factor)
    scores = find_scores(inner)
    if isinstance(scores, str):
        return scores
    if scores.masks or scores.softcap:
        return f"its scores are scaled in {node.name!r} after they are masked or capped"
    return replace(scores, scale=scores.scale * factor)


def _capped(tanh: ir.Node, cap: float) -> Scores | str:
    scores = find_scores(g.operand(tanh, 0))
    if isinstance(scores, str):
        return scores
    if scores.masks or scores.softcap:
        return f"its scores are capped in {tanh.name!r} after they are masked or capped"
    return replace(scores, scale=scores.scale * cap, softcap=cap)


def _masked_by_add(node: ir.Node) -> Scores | str:
    reasons = []
    for mine, other in ((0, 1), (1, 0)):
        scores = find_scores(g.operand(node, mine))
        if isinstance(scores, Scores):
            masks = (*scores.masks, ("add", g.operand(node, other)))
            return replace(scores, masks=masks)
        reasons.append(scores)
    return reasons[0]


def _masked_by_where(node: ir.Node) -> Scores | str:
    condition = g.operand(node, 0)
    for kind, mine, other in (("keep", 1, 2), ("drop", 2, 1)):
        fill = g.constant(node.inputs[other], 1 << 20)
        if fill is None:
            continue
        if not np.all(fill <= FORBIDDEN):
            return f"it is masked with {float(np.max(fill)):g} in {node.name!r}"
        scores = find_scores(g.operand(node, mine))
        if isinstance(scores, str):
            return scores
        return replace(scores, masks=(*scores.masks, (kind, condition)))
    return f"it is masked with no constant in {node.name!r}"


def _through(node: ir.Node) -> Scores | str:
    return find_scores(g.operand(node, 0))


_STEPS: Final[Mapping[str, Callable[[ir.Node], Scores | str]]] = {
    "MatMul": _product,
    "Mul": _scaled,
    "Div": _scaled,
    "Add": _masked_by_add,
    "Where": _masked_by_where,
    "Cast": _through,
    "Identity": _through,
}


def _weighted_sum(softmax: ir.Node) -> ir.Node | str:
    """Return the MatMul of the weights with V, or why there is none."""
    axis = g.attribute(softmax, "axis", -1)
    if axis not in (-1, (g.rank(softmax.outputs[0]) or 0) - 1):
        return f"its softmax is over axis {axis}, not the last"
    value = softmax.outputs[0]
    while True:
        if value.is_graph_output():
            return "its weights are a graph output"
        readers = [n for n in g.users(value) if n.op_type != "IsNaN"]
        if len(readers) != 1:
            return f"its weights are read by {len(readers)} nodes"
        node = readers[0]
        if g.is_op(node, "MatMul") and node.inputs[0] is value:
            return node
        if not (g.is_op(node, "Cast", "Dropout", "Identity") or _guards(node, value)):
            return f"its weights go to {node.op_type} {node.name!r}, not to a product with V"
        value = node.outputs[0]


def _guards(node: ir.Node, weights: ir.Value) -> bool:
    """Whether ``node`` is Where(IsNaN(weights), 0, weights): a query that sees nothing gives 0."""
    if not g.is_op(node, "Where") or node.inputs[2] is not weights:
        return False
    test = g.producer(node.inputs[0], "IsNaN")
    return test is not None and test.inputs[0] is weights and g.scalar(node.inputs[1]) == 0.0


def _fuse(scores: Scores, product: ir.Node, softmax: ir.Node) -> None:
    build = g.Builder(product)
    v = g.operand(product, 1)
    if alone := g.rank(scores.q) == 3:
        masks = tuple((kind, _one_head(build, mask)) for kind, mask in scores.masks)
        q, k, v = (_one_head(build, x) for x in (scores.q, scores.k, v))
        scores = replace(scores, q=q, k=k, masks=masks)
    k, sizes = scores.k, g.shape(scores.k)
    if not scores.transposed:
        k = build.op("Transpose", [scores.k], {"perm": [0, 1, 3, 2]})
        k.shape = ir.Shape([*sizes[:2], sizes[3], sizes[2]]) if sizes else None
        k.type = scores.k.type
    attributes = AttentionAttributes(scale=scores.scale, softcap=scores.softcap).written()
    inputs = [scores.q, k, v, combine(build, scores.masks, scores.q)]
    out = build.op("Attention", inputs, attributes, name=softmax.name)
    old = product.outputs[0]
    out.shape, out.type = old.shape, old.type
    if alone:
        rows = g.shape(old) or []
        out.shape = ir.Shape([rows[0], 1, *rows[1:]])
        out = build.op("Squeeze", [out, build.constant([1], "int64")], like=old)
    g.replace(old, out)


def _one_head(build: g.Builder, x: ir.Value) -> ir.Value:
    """Return [N, S, D] as [N, 1, S, D], and what has fewer axes as it is."""
    sizes = g.shape(x)
    if sizes is None or len(sizes) < 3:
        return x
    return build.op(
        "Unsqueeze", [x, build.constant([1], "int64")], like=x, shape=[sizes[0], 1, *sizes[1:]]
    )


def combine(
    build: g.Builder, masks: tuple[tuple[str, ir.Value], ...], like: ir.Value
) -> ir.Value | None:
    """Return one mask that does what all of ``masks`` do: boolean if it can be."""
    booleans = [
        _not(build, value) if kind == "drop" else value for kind, value in masks if kind != "add"
    ]
    mask: ir.Value | None = None
    for value in booleans:
        mask = value if mask is None else _both(build, "And", mask, value)
    added = [value for kind, value in masks if kind == "add"]
    if not added:
        return mask
    total = added[0]
    for value in added[1:]:
        total = _both(build, "Add", total, value)
    if mask is None:
        return total
    dtype = total.dtype or like.dtype or ir.DataType.FLOAT
    # not infinity: where a query may attend to nothing, its weights must be numbers
    lowest = ml_dtypes.finfo(dtype.numpy()).min  # type: ignore[no-untyped-call]
    forbidden = build.constant(np.asarray(lowest, dtype.numpy()))
    sizes = g.broadcast(mask, total)
    return build.op("Where", [mask, total, forbidden], shape=sizes, dtype=dtype)


def _not(build: g.Builder, value: ir.Value) -> ir.Value:
    if (inner := g.producer(value, "Not")) is not None:
        return g.operand(inner, 0)
    return build.op("Not", [value], like=value)


def _both(build: g.Builder, op_type: str, a: ir.Value, b: ir.Value) -> ir.Value:
    return build.op(op_type, [a, b], shape=g.broadcast(a, b), dtype=a.dtype)
