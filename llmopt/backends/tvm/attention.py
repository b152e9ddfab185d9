"""Attention and rotary positions: which kernels compute them, and the plain way where none does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from llmopt.backends.tvm import api
from llmopt.backends.tvm.kernels import plain
from llmopt.backends.tvm.kernels.attention import selection as kernels
from llmopt.backends.tvm.lower_attention import padded
from llmopt.backends.tvm.writing import dtype_of, shape_of
from llmopt.ir import graph as g
from llmopt.ir.attention import AttentionAttributes, AttentionOp

if TYPE_CHECKING:
    from llmopt.backends.tvm.function import Function

_LOWEST = float(np.finfo(np.float32).min)


def _kernel(form: AttentionAttributes, width: int, **where: bool) -> kernels.AttentionForm:
    """Return what the kernels call an Attention of heads that are ``width`` wide.

    Args:
        form: Attributes.
        width: D, of queries and keys.
        where: Whether there is a mask, keys are in a cache, or Q, K and V in one row.
    """
    left, right = (size if size >= 0 else None for size in form.window)
    scale = form.scaling(width)
    return kernels.AttentionForm(
        heads=form.heads,
        kv_heads=form.groups,
        width=width,
        causal=form.causal,
        left=left,
        right=right,
        softcap=form.softcap,
        scale=None if scale == width**-0.5 else scale,
        **{"masked": False, "cached": False, "packed": False, **where},
    )


def attention(f: Function, node: ir.Node) -> Sequence[Any]:
    """Write an Attention; a cache is written in place."""
    op = AttentionOp.of(node)
    q, k, v = map(f.tensor, op.qkv)
    if op.past is None and _padding_alone(f, op, (q, k, v)):
        return [_separate(f, op, (q, k, v))]
    if op.past is None:
        keys, values = (_headed(f, x, op.groups) for x in (k, v))
        return [_plain(f, op, (_headed(f, q, op.heads), keys, values))]
    caches = map(f.tensor, op.past)
    keys, values = (
        f.emit(_in_use(f, _append(f, cache, new)))
        for cache, new in zip(caches, (k, v), strict=True)
    )
    return [_plain(f, op, (_headed(f, q, op.heads), keys, values))]


def _padding_alone(f: Function, op: AttentionOp, operands: Sequence[Any]) -> bool:
    """Whether the kernel computes an Attention without a cache."""
    q, k, v = (shape_of(x) for x in operands)
    if not q[2] // op.heads == k[2] // op.groups == v[2] // op.groups:
        return False
    if op.mask is None:
        return True
    return padded(op) and f.mask is not None and api.equal(shape_of(f.mask)[1], k[1])


def _separate(f: Function, op: AttentionOp, operands: Sequence[Any]) -> Any:
    """Return Attention to keys and values that are apart from the queries."""
    batch, tokens, row = shape_of(operands[0])
    keys = shape_of(operands[1])[1]
    wanted = _kernel(op, row // op.heads, masked=op.mask is not None)
    mask = f.mask if wanted.masked else f.ones(batch, keys)
    given = dict(zip(("q", "k", "v"), map(f.rows, operands), strict=True)) | {"mask": mask}
    shape = ([api.product([batch, tokens]), wanted.heads * wanted.width], "float32")
    kernel = f.module.cached(kernels.attention, wanted, f.features)
    (y,) = f.call(kernel, given, [shape])
    return f.unrows(y, [batch, tokens])


def _append(f: Function, cache: Any, new: Any) -> Any:
    """Return ``cache`` [B, G, C, D] with ``new`` [B, S, G*D] written behind what is in use."""
    _, groups, _, width = shape_of(cache)
    kernel = f.module.cached(plain.append, groups, width)
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


def _plain(f: Function, form: AttentionOp, operands: tuple[Any, Any, Any]) -> Any:
    """Return Attention as products and a softmax: any mask, not fast."""
    op = api.relax().op
    q, k, v = operands
    batch, _, new, width = shape_of(q)
    keys, out_width = shape_of(k)[2], shape_of(v)[3]
    repeats = form.heads // form.groups
    if repeats > 1:
        k, v = (f.emit(op.repeat(x, repeats, 1)) for x in (k, v))
    turned = f.emit(op.permute_dims(k, [0, 1, 3, 2]))
    scores = f.emit(op.matmul(q, turned))
    scores = f.emit(op.multiply(scores, api.scalar(form.scaling(width), "float32")))
    if form.softcap:
        cap = api.scalar(form.softcap, "float32")
        scores = f.emit(op.multiply(f.emit(op.tanh(f.emit(op.divide(scores, cap)))), cap))
    scores = _masked(f, form, scores, (new, keys))
    mixed = f.emit(op.matmul(f.emit(op.nn.softmax(scores, -1)), v))
    first = f.emit(op.permute_dims(mixed, [0, 2, 1, 3]))
    return op.reshape(first, [batch, new, form.heads * out_width])


def _masked(f: Function, form: AttentionOp, scores: Any, sizes: tuple[Any, Any]) -> Any:
    """Return scores [B, H, S, T] with the lowest number where a query does not see a key."""
    op = api.relax().op
    low = api.scalar(_LOWEST, "float32")
    seen = _placed(f, form, sizes)
    if seen is not None:
        scores = f.emit(op.where(seen, scores, low))
    if form.mask is None:
        return scores
    given = f.tensor(form.mask)
    if dtype_of(given) == "bool":
        return f.emit(op.where(given, scores, low))
    return f.emit(op.add(scores, given))


def _placed(f: Function, form: AttentionAttributes, sizes: tuple[Any, Any]) -> Any:
    """Return which keys each query sees by its place, bool [S, T]; None for all."""
    op = api.relax().op
    if not form.placed:
        return None
    left, right = form.window
    new, keys = sizes
    row = f.emit(op.arange(keys - new, keys, 1, "int64"))
    query = f.emit(op.reshape(row, [new, 1]))
    key = f.emit(op.reshape(f.emit(op.arange(0, keys, 1, "int64")), [1, keys]))
    ahead = f.emit(op.subtract(key, query))
    right = 0 if form.causal else right
    seen = None
    if right >= 0:
        seen = f.emit(op.less_equal(ahead, api.scalar(right, "int64")))
    if left >= 0:
        near = f.emit(op.greater_equal(ahead, api.scalar(-left, "int64")))
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
    attributes = AttentionAttributes.of(node)
    rotation = kernels.Rotation(
        _head_width(attributes, width),
        2 * shape_of(operands["cos"])[-1] if "cos" in operands else 0,
        g.attribute(node, "epsilon", None),
    )
    form = _kernel(attributes, rotation.width, masked=_masked_row(node), cached=True)
    decoding = f.entry.one
    make = kernels.decode if decoding else kernels.append
    kernel = f.module.cached(make, form, rotation, f.features)
    caches = [operands["k_cache"], operands["v_cache"]]
    shapes = [([batch * tokens, form.heads * form.width], "float32")]
    shapes += [(shape_of(cache), "float32") for cache in caches]
    y, *presents = f.call(kernel, operands, shapes, {1: "k_cache", 2: "v_cache"})
    if not decoding:
        given = dict(zip(("k_cache", "v_cache"), presents, strict=True))
        many = replace(form, rounded=_rounds(f))
        attend = f.module.cached(kernels.attention, many, f.features)
        (y,) = f.call(attend, {**given, "q": y, "mask": f.mask}, shapes[:1])
    return [f.unrows(y, [batch, tokens]), *presents]


def packed(f: Function, node: ir.Node) -> Sequence[Any]:
    """Write attention of a row of Q, K and V without a cache."""
    row = f.tensor(node.inputs[0])
    batch, tokens, width = shape_of(row)
    # always masked: of a kernel that reads one tensor alone TVM asks whether it is a reshape, and
    # comes down where it has no blocks
    attributes = AttentionAttributes.of(node)
    form = _kernel(attributes, _head_width(attributes, width), masked=True, packed=True)
    mask = f.mask if _masked_row(node) else f.ones(batch, tokens)
    operands = {"qkv": f.rows(row), "mask": mask}
    shape = ([batch * tokens, form.heads * form.width], "float32")
    kernel = f.module.cached(kernels.attention, replace(form, rounded=_rounds(f)), f.features)
    (y,) = f.call(kernel, operands, [shape])
    return [f.unrows(y, [batch, tokens])]


def _rounds(f: Function) -> bool:
    """Return whether queries, keys and values may be rounded: where activations are anyway."""
    return not f.entry.exact and any(entry.exact for entry in f.module.entries)


def _head_width(form: AttentionAttributes, width: int) -> int:
    """Return how wide a head is where a row of Q, K and V is ``width`` wide."""
    return width // (form.heads + 2 * form.groups)


def _masked_row(node: ir.Node) -> bool:
    return bool(g.attribute(node, "padded", 0))
