"""Attention and rotary positions: which kernels compute them, and the plain way where none does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from llmopt.backends.tvm import api
from llmopt.backends.tvm.kernels import plain
from llmopt.backends.tvm.kernels.attention import selection as kernels
from llmopt.backends.tvm.lower_attention import padded
from llmopt.backends.tvm.writing import dtype_of, shape_of
from llmopt.ir import graph as g

if TYPE_CHECKING:
    from llmopt.backends.tvm.function import Function

_LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Form:
    """What an Attention computes.

    Args:
        heads: H.
        kv_heads: G.
        width: D, of queries and keys.
        scale: Of the scores.
        causal: Whether a query sees no later key.
        left: How far back it sees; -1 for all the way.
        right: How far ahead; -1 for all the way.
        softcap: Bound of the scores; 0 for none.
    """

    heads: int
    kv_heads: int
    width: int
    scale: float
    causal: bool
    left: int
    right: int
    softcap: float

    @classmethod
    def of(cls, node: ir.Node, q_width: int) -> Form:
        """Return the form of a node whose Q is ``q_width`` wide."""
        heads = g.attribute(node, "q_num_heads", 1)
        width = q_width // heads
        return cls(
            heads=heads,
            kv_heads=g.attribute(node, "kv_num_heads", 1),
            width=width,
            scale=g.attribute(node, "scale", None) or width**-0.5,
            causal=bool(g.attribute(node, "is_causal", 0)),
            left=g.attribute(node, "left_window_size", -1),
            right=g.attribute(node, "right_window_size", -1),
            softcap=g.attribute(node, "softcap", 0.0),
        )

    def kernel(self, **where: bool) -> kernels.AttentionForm:
        """Return what the kernels call it; ``where`` says where keys and their mask are."""
        return kernels.AttentionForm(
            heads=self.heads,
            kv_heads=self.kv_heads,
            width=self.width,
            causal=self.causal,
            left=self.left if self.left >= 0 else None,
            right=self.right if self.right >= 0 else None,
            softcap=self.softcap,
            scale=None if self.scale == self.width**-0.5 else self.scale,
            **{"masked": False, "cached": False, "packed": False, **where},
        )


def attention(f: Function, node: ir.Node) -> Sequence[Any]:
    """Write an Attention; a cache is written in place."""
    q, k, v = (f.tensor(node.inputs[i]) for i in range(3))
    form = Form.of(node, shape_of(q)[-1])
    if g.optional(node, 4) is None and _padding_alone(f, node, (q, k, v)):
        return [_separate(f, node, form, (q, k, v))]
    if g.optional(node, 4) is None:
        keys, values = (_headed(f, x, form.kv_heads) for x in (k, v))
        return [_plain(f, node, form, (_headed(f, q, form.heads), keys, values))]
    caches = [f.tensor(node.inputs[i]) for i in (4, 5)]
    keys, values = (
        f.emit(_in_use(f, _append(f, cache, new)))
        for cache, new in zip(caches, (k, v), strict=True)
    )
    return [_plain(f, node, form, (_headed(f, q, form.heads), keys, values))]


def _padding_alone(f: Function, node: ir.Node, operands: Sequence[Any]) -> bool:
    """Whether the kernel computes an Attention without a cache."""
    q, k, v = (shape_of(x) for x in operands)
    heads, groups = (int(g.attribute(node, f"{x}_num_heads", 1)) for x in ("q", "kv"))
    if not q[2] // heads == k[2] // groups == v[2] // groups:
        return False
    if g.optional(node, 3) is None:
        return True
    return padded(node) and f.mask is not None and api.equal(shape_of(f.mask)[1], k[1])


def _separate(f: Function, node: ir.Node, form: Form, operands: Sequence[Any]) -> Any:
    """Return Attention to keys and values that are apart from the queries."""
    batch, tokens, _ = shape_of(operands[0])
    keys = shape_of(operands[1])[1]
    wanted = form.kernel(masked=g.optional(node, 3) is not None)
    mask = f.mask if wanted.masked else f.ones(batch, keys)
    given = dict(zip(("q", "k", "v"), map(f.rows, operands), strict=True)) | {"mask": mask}
    shape = ([api.product([batch, tokens]), form.heads * form.width], "float32")
    kernel = f.module.made(kernels.attention, wanted, f.features)
    (y,) = f.call(kernel, given, [shape])
    return f.unrows(y, [batch, tokens])


def _append(f: Function, cache: Any, new: Any) -> Any:
    """Return ``cache`` [B, G, C, D] with ``new`` [B, S, G*D] written behind what is in use."""
    _, groups, _, width = shape_of(cache)
    kernel = f.module.made(plain.append, groups, width)
    operands = {"cache": cache, "new": new, "mask": f.mask}
    shape = (shape_of(cache), "float32")
    return f.call(kernel, operands, [shape], {0: "cache"})[0]


def _in_use(f: Function, cache: Any) -> Any:
    """Return the keys or values [B, G, T, D] of a cache."""
    return api.relax().op.strided_slice(cache, [2], [0], [f.total], assume_inbound=True)


def _headed(f: Function, x: Any, heads: int) -> Any:
    """Return [B, S, H*D] as [B, H, S, D]."""
    op = api.relax().op
    batch, tokens, width = shape_of(x)
    split = f.emit(op.reshape(x, [batch, tokens, heads, width // heads]))
    return f.emit(op.permute_dims(split, [0, 2, 1, 3]))


def _plain(f: Function, node: ir.Node, form: Form, operands: tuple[Any, Any, Any]) -> Any:
    """Return Attention as products and a softmax: any mask, not fast."""
    op = api.relax().op
    q, k, v = operands
    batch, _, new, _ = shape_of(q)
    keys, out_width = shape_of(k)[2], shape_of(v)[3]
    repeats = form.heads // form.kv_heads
    if repeats > 1:
        k, v = (f.emit(op.repeat(x, repeats, 1)) for x in (k, v))
    turned = f.emit(op.permute_dims(k, [0, 1, 3, 2]))
    scores = f.emit(op.matmul(q, turned))
    scores = f.emit(op.multiply(scores, api.scalar(form.scale, "float32")))
    if form.softcap:
        cap = api.scalar(form.softcap, "float32")
        scores = f.emit(op.multiply(f.emit(op.tanh(f.emit(op.divide(scores, cap)))), cap))
    scores = _masked(f, node, form, scores, (new, keys))
    mixed = f.emit(op.matmul(f.emit(op.nn.softmax(scores, -1)), v))
    first = f.emit(op.permute_dims(mixed, [0, 2, 1, 3]))
    return op.reshape(first, [batch, new, form.heads * out_width])


def _masked(f: Function, node: ir.Node, form: Form, scores: Any, sizes: tuple[Any, Any]) -> Any:
    """Return scores [B, H, S, T] with the lowest number where a query does not see a key."""
    op = api.relax().op
    low = api.scalar(_LOWEST, "float32")
    seen = _placed(f, form, sizes)
    if seen is not None:
        scores = f.emit(op.where(seen, scores, low))
    mask = g.optional(node, 3)
    if mask is None:
        return scores
    given = f.tensor(mask)
    if dtype_of(given) == "bool":
        return f.emit(op.where(given, scores, low))
    return f.emit(op.add(scores, given))


def _placed(f: Function, form: Form, sizes: tuple[Any, Any]) -> Any:
    """Return which keys each query sees by its place, bool [S, T]; None for all."""
    op = api.relax().op
    if not form.causal and form.left < 0 and form.right < 0:
        return None
    new, keys = sizes
    row = f.emit(op.arange(keys - new, keys, 1, "int64"))
    query = f.emit(op.reshape(row, [new, 1]))
    key = f.emit(op.reshape(f.emit(op.arange(0, keys, 1, "int64")), [1, keys]))
    ahead = f.emit(op.subtract(key, query))
    right = 0 if form.causal else form.right
    seen = None
    if right >= 0:
        seen = f.emit(op.less_equal(ahead, api.scalar(right, "int64")))
    if form.left >= 0:
        near = f.emit(op.greater_equal(ahead, api.scalar(-form.left, "int64")))
        seen = near if seen is None else f.emit(op.logical_and(seen, near))
    return seen


def cached(f: Function, node: ir.Node) -> Sequence[Any]:
    """Write rotation, cache and attention of a row of Q, K and V; the cache is written in place."""
    row = f.tensor(node.inputs[0])
    batch, tokens, width = shape_of(row)
    labels = ("q_norm", "k_norm", "cos", "sin", "position_ids", "k_cache", "v_cache")
    operands = {
        label: f.tensor(value)
        for label, value in zip(labels, node.inputs[1:], strict=False)
        if value is not None
    }
    operands |= {"qkv": f.rows(row), "mask": f.mask}
    turning = kernels.Turning(
        _head_width(node, width),
        2 * shape_of(operands["cos"])[-1] if "cos" in operands else 0,
        g.attribute(node, "epsilon", None),
    )
    form = _row_form(node, width).kernel(masked=_masked_row(node), cached=True)
    decoding = f.entry.one
    make = kernels.decode if decoding else kernels.append
    kernel = f.module.made(make, form, turning, f.features)
    caches = [operands["k_cache"], operands["v_cache"]]
    shapes = [([batch * tokens, form.heads * form.width], "float32")]
    shapes += [(shape_of(cache), "float32") for cache in caches]
    y, *presents = f.call(kernel, operands, shapes, {1: "k_cache", 2: "v_cache"})
    if not decoding:
        given = dict(zip(("k_cache", "v_cache"), presents, strict=True))
        many = replace(form, rounded=_rounds(f))
        attend = f.module.made(kernels.attention, many, f.features)
        (y,) = f.call(attend, {**given, "q": y, "mask": f.mask}, shapes[:1])
    return [f.unrows(y, [batch, tokens]), *presents]


def packed(f: Function, node: ir.Node) -> Sequence[Any]:
    """Write attention of a row of Q, K and V without a cache."""
    row = f.tensor(node.inputs[0])
    batch, tokens, width = shape_of(row)
    # always masked: of a kernel that reads one tensor alone TVM asks whether it is a reshape, and
    # comes down where it has no blocks
    form = _row_form(node, width).kernel(masked=True, packed=True)
    mask = f.mask if _masked_row(node) else f.ones(batch, tokens)
    operands = {"qkv": f.rows(row), "mask": mask}
    shape = ([batch * tokens, form.heads * form.width], "float32")
    kernel = f.module.made(kernels.attention, replace(form, rounded=_rounds(f)), f.features)
    (y,) = f.call(kernel, operands, [shape])
    return [f.unrows(y, [batch, tokens])]


def _rounds(f: Function) -> bool:
    """Return whether queries, keys and values may be rounded: where activations are anyway."""
    return not f.entry.exact and any(entry.exact for entry in f.module.entries)


def _head_width(node: ir.Node, width: int) -> int:
    heads, groups = (int(g.attribute(node, f"{x}_num_heads", 1)) for x in ("q", "kv"))
    return width // (heads + 2 * groups)


def _row_form(node: ir.Node, width: int) -> Form:
    """Return the form of a node that reads a row of Q, K and V."""
    heads = int(g.attribute(node, "q_num_heads", 1))
    return Form.of(node, heads * _head_width(node, width))


def _masked_row(node: ir.Node) -> bool:
    return bool(g.attribute(node, "padded", 0))
