"""Attention, rotation and cache: which kernel serves what is wanted.

Rows are flat: an activation is [M, width] with M = B·S, B and T come from the mask [B, T], so no
kernel needs a reshape around it. Caches [B, G, C, D] are written in place; T = P + S of their C
rows are in use once the new keys are in. A model without an ``attention_mask`` passes one of ones:
its shape says how many keys there are.

========== ======================= =================================================== ========
function   for                     inputs                                              outputs
========== ======================= =================================================== ========
attention  encoders, packed        qkv, mask                                           y
attention  encoders, cross         q, k, v, mask                                       y
append     prefill, before         qkv, [q_norm, k_norm], [cos, sin, position_ids],    q
           attention               mask, k_cache, v_cache
attention  prefill, cached         q, k_cache, v_cache, mask                           y
decode     one token a sequence    qkv, [q_norm, k_norm], [cos, sin, position_ids],    y
                                   mask, k_cache, v_cache
========== ======================= =================================================== ========

Inputs in brackets are there if the `Turning` asks for them.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels import attention_decode, attention_prefill
from llmopt.backends.tvm.kernels.attention_decode import Fresh, append_row
from llmopt.backends.tvm.kernels.attention_form import Attention
from llmopt.backends.tvm.kernels.heads import Turning, lanes_for, turn
from llmopt.backends.tvm.kernels.kernel import Kernel
from llmopt.backends.tvm.kernels.vectors import kept, variable

__all__ = ["Attention", "Turning", "append", "attention", "decode"]
_TURNED = ("qkv", "q_norm", "k_norm", "cos", "sin", "position_ids", "mask", "k_cache", "v_cache")


def attention(form: Attention, features: Features) -> Kernel:
    """Return attention of many queries.

    Inputs are ``q [M, H·D], k_cache, v_cache [B, G, C, D], mask [B, T]`` if cached,
    ``qkv [M, H·D + 2·G·D], mask`` if packed, else ``q, k [B·T, G·D], v, mask``; the output is
    ``y [M, H·D]``.
    """
    if form.cached:
        inputs: tuple[str, ...] = ("q", "k_cache", "v_cache", "mask")
        function = attention_prefill.cached(form, features)
    elif form.packed:
        inputs, function = ("qkv", "mask"), attention_prefill.packed(form, features)
    else:
        inputs, function = ("q", "k", "v", "mask"), attention_prefill.separate(form, features)
    return Kernel(f"attention_{form.label}_{features.label}", function, inputs, ("y",))


def decode(form: Attention, turning: Turning, features: Features) -> Kernel:
    """Return rotation, cache and attention of one new token a sequence.

    The output is ``y [B, H·D]``; key and value of the token are written to the caches at T - 1.
    """
    name = f"decode_{form.label}_{turning.label}_{features.label}"
    return _with_inputs(name, attention_decode.fused(form, turning, features), turning, "y")


def append(form: Attention, turning: Turning, features: Features) -> Kernel:
    """Return rotation of new rows and their place in the caches, from T - S on.

    The output is ``q [M, H·D]``, turned, not scaled.
    """
    name = f"append_{form.label}_{turning.label}_{features.label}"
    return _with_inputs(name, _append(form, turning, features), turning, "q")


def _with_inputs(name: str, function: Any, turning: Turning, output: str) -> Kernel:
    needed = turning.reads | {"qkv", "mask", "k_cache", "v_cache"}
    inputs = tuple(each for each in _TURNED if each in needed)
    return Kernel(name, kept(function, (*_TURNED, output), {*inputs, output}), inputs, (output,))


def _append(form: Attention, turning: Turning, features: Features) -> Any:
    """Return the function (qkv, q_norm, …, position_ids, mask, k_cache, v_cache, q)."""
    lanes, half = lanes_for(turning, features), max(turning.rotary // 2, 1)
    width, heads, group = form.width, form.heads, form.kv_heads

    @T.prim_func(s_tir=True)
    def append(
        qkv: T.handle,
        q_norm: T.handle,
        k_norm: T.handle,
        cos: T.handle,
        sin: T.handle,
        position_ids: T.handle,
        mask: T.handle,
        k_cache: T.handle,
        v_cache: T.handle,
        q: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        rows, batch, length, keys = T.int64(), T.int64(), T.int64(), T.int64()
        room, angles = T.int64(), T.int64()
        parts = T.match_buffer(qkv, (rows, (heads + 2 * group) * width), "float32")
        q_weight = T.match_buffer(q_norm, (width,), "float32")
        k_weight = T.match_buffer(k_norm, (width,), "float32")
        cosines = T.match_buffer(cos, (angles, half), "float32")
        sines = T.match_buffer(sin, (angles, half), "float32")
        T.match_buffer(mask, (batch, keys), "int64")
        positions = T.match_buffer(position_ids, (batch, length), "int64")
        keys_at = T.match_buffer(k_cache, (batch, group, room, width), "float32")
        values_at = T.match_buffer(v_cache, (batch, group, room, width), "float32")
        out = T.match_buffer(q, (rows, heads * width), "float32")
        norms = T.meta_var((q_weight, k_weight))
        tables = T.meta_var((cosines, sines))
        many = rows // batch
        new = T.meta_var(Fresh(form, turning, lanes, parts, norms, tables, positions, many))
        _append_all(new, rows, keys - many, (keys_at, values_at, out))

    return append


def _append_all(new: Fresh, rows: Any, past: Any, targets: tuple[Any, Any, Any]) -> None:
    """Write caches and turned queries of all rows."""
    heads, group, width = new.form.heads, new.form.kv_heads, new.form.width
    with T.parallel(rows) as row:
        b, slot = variable(row // new.length), variable(past + row % new.length)
        with T.serial(heads) as h:
            turn(new.query(row, h, (targets[2], (row, h * width)), 1.0))
        with T.serial(group) as g:
            append_row(new, row, g, targets[:2], (b, g, slot, 0))
