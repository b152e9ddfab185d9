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

Inputs in brackets are there if the `Rotation` asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels.attention import (
    decode as attention_decode,
)
from llmopt.backends.tvm.kernels.attention import (
    prefill as attention_prefill,
)
from llmopt.backends.tvm.kernels.attention import (
    rows as attention_rows,
)
from llmopt.backends.tvm.kernels.attention.addresses import Addresses
from llmopt.backends.tvm.kernels.attention.form import AttentionForm
from llmopt.backends.tvm.kernels.attention.rows import Fresh
from llmopt.backends.tvm.kernels.heads import Rotation, lanes_for
from llmopt.backends.tvm.kernels.kernel import Kernel
from llmopt.backends.tvm.kernels.signature import Argument, kernel
from llmopt.backends.tvm.kernels.vectors import variable

__all__ = ["AttentionForm", "Rotation", "append", "attention", "decode"]


def attention(form: AttentionForm, features: Features) -> Kernel:
    """Return attention of many queries.

    Inputs are ``q [M, H·D], k_cache, v_cache [B, G, C, D], mask [B, T]`` if cached,
    ``qkv [M, H·D + 2·G·D], mask`` if packed, else ``q, k [B·T, G·D], v, mask``; the output is
    ``y [M, H·D]``.
    """
    sources = _sources(form)

    def body(buffers: Mapping[str, Any]) -> None:
        q, *others = (buffers[source.name] for source in sources)
        k, v = others or (q, q)
        mask, y = buffers["mask"], buffers["y"]
        batch, keys = mask.ty.shape
        length = variable(q.ty.shape[0] // batch)
        io = Addresses(form, q, k, v, mask, y, length, keys)
        attention_prefill.attend(io, features, batch)

    inputs = [*sources, Argument("mask", ("batch", "keys"), "int64")]
    outputs = [Argument("y", ("rows", form.heads * form.width))]
    return kernel(f"attention_{form.label}_{features.label}", inputs, outputs, body)


def _sources(form: AttentionForm) -> list[Argument]:
    """Return what holds queries, keys and values: one for all where they are packed."""
    queries, held = form.heads * form.width, form.kv_heads * form.width
    q = Argument("q", ("rows", queries))
    if form.cached:
        cache = ("batch", form.kv_heads, "room", form.width)
        return [q, Argument("k_cache", cache), Argument("v_cache", cache)]
    if form.packed:
        return [Argument("qkv", ("rows", queries + 2 * held))]
    return [q, Argument("k", ("held", held)), Argument("v", ("held", held))]


def decode(form: AttentionForm, rotation: Rotation, features: Features) -> Kernel:
    """Return rotation, cache and attention of one new token a sequence.

    The output is ``y [B, H·D]``; key and value of the token are written to the caches at T - 1.
    """
    lanes, one = lanes_for(rotation, features), T.int64(1)

    def body(buffers: Mapping[str, Any]) -> None:
        mask, caches = buffers["mask"], (buffers["k_cache"], buffers["v_cache"])
        batch, keys = mask.ty.shape
        io = Addresses(form, buffers["qkv"], *caches, mask, buffers["y"], one, keys)
        new = Fresh.of(form, rotation, lanes, buffers, one)
        attention_decode.attend(io, new, features, batch)

    inputs = attention_rows.arguments(form, rotation, "batch", 1)
    outputs = [Argument("y", ("batch", form.heads * form.width))]
    name = f"decode_{form.label}_{rotation.label}_{features.label}"
    return kernel(name, inputs, outputs, body)


def append(form: AttentionForm, rotation: Rotation, features: Features) -> Kernel:
    """Return rotation of new rows and their place in the caches, from T - S on.

    The output is ``q [M, H·D]``, turned, not scaled.
    """
    lanes = lanes_for(rotation, features)

    def body(buffers: Mapping[str, Any]) -> None:
        rows, (batch, keys) = buffers["qkv"].ty.shape[0], buffers["mask"].ty.shape
        length = variable(rows // batch)
        targets = (buffers["k_cache"], buffers["v_cache"], buffers["q"])
        new = Fresh.of(form, rotation, lanes, buffers, length)
        attention_rows.append_all(new, rows, keys - length, targets)

    inputs = attention_rows.arguments(form, rotation, "rows", "length")
    outputs = [Argument("q", ("rows", form.heads * form.width))]
    name = f"append_{form.label}_{rotation.label}_{features.label}"
    return kernel(name, inputs, outputs, body)
