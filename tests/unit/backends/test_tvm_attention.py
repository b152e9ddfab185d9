"""Attention kernels of TVM against numpy in float64: what is seen, cached and turned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from support.emulated_tiles import EmulatedTiles
from support.kernel_calls import AVX2, Array, call, error, floats, host, narrow

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels import amx
from llmopt.backends.tvm.kernels.attention.selection import (
    AttentionForm,
    Rotation,
    append,
    attention,
    decode,
)
from llmopt.runtime.cpu_features import tiles_allowed

CLOSE = 3e-6
"""Of the largest magnitude; the most that was seen is 1.4e-6."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def attended(q: Array, k: Array, v: Array, mask: Array, form: AttentionForm) -> Array:
    """Return attention of q [B, S, H, D] to k, v [B, T, G, D], in float64."""
    k, v = (np.repeat(x.astype(np.float64), form.ratio, 2) for x in (k, v))
    scores = np.einsum("bshd,bthd->bhst", q.astype(np.float64), k)
    scores *= form.width**-0.5 if form.scale is None else form.scale
    if form.softcap:
        scores = form.softcap * np.tanh(scores / form.softcap)
    weights = np.exp(scores) * seen(q.shape[1], mask, form)
    total = weights.sum(-1, keepdims=True)
    out: Array = np.einsum("bhst,bthd->bshd", weights / np.where(total == 0, 1, total), v)
    return out


def seen(length: int, mask: Array, form: AttentionForm) -> Array:
    """Return which keys each query sees, [B, 1, S, T]."""
    keys = mask.shape[1]
    ahead = np.arange(keys)[None] - (keys - length + np.arange(length)[:, None])
    visible = np.ones_like(ahead, bool)
    if form.later is not None:
        visible &= ahead <= form.later
    if form.left is not None:
        visible &= ahead >= -form.left
    padding = mask != 0 if form.masked else np.ones_like(mask, bool)
    both: Array = visible[None, None] & padding[:, None, None]
    return both


def padded(batch: int, keys: int) -> Array:
    """Return a mask [B, T]: row b has b keys of padding on the left, b on the right."""
    mask = np.ones((batch, keys), np.int64)
    for b in range(1, batch):
        mask[b, :b], mask[b, -b:] = 0, 0
    return mask


def test_packed_heads_attend(rng: np.random.Generator) -> None:
    check_packed(AttentionForm(6, 6, 32, packed=True), (2, 70), rng)


@pytest.mark.parametrize(
    ("form", "sizes"),
    [
        (AttentionForm(6, 2, 64, causal=True), (2, 133)),
        (AttentionForm(6, 3, 24, causal=True, left=5, softcap=2.0), (3, 17)),
        (AttentionForm(4, 4, 20, left=6, right=9, scale=0.3, masked=False), (1, 77)),
        (AttentionForm(5, 1, 7), (2, 1)),
    ],
    ids=lambda x: x.label if isinstance(x, AttentionForm) else "x".join(map(str, x)),
)
def test_queries_see_what_they_may(
    form: AttentionForm, sizes: tuple[int, int], rng: np.random.Generator
) -> None:
    check_packed(replace(form, packed=True), sizes, rng)


def test_packed_heads_attend_with_avx2_alone(rng: np.random.Generator) -> None:
    check_packed(AttentionForm(6, 2, 40, causal=True, packed=True), (2, 45), rng, (narrow(), AVX2))


ROUNDED = 1e-2
"""bfloat16 keeps 8 bits: 4e-3 a product, the most that was seen is 5e-3."""


@pytest.mark.parametrize("width", [32, 48, 24], ids=["d32", "d48", "d24-in-float32"])
def test_rounded_products_are_close(width: int, rng: np.random.Generator) -> None:
    form = AttentionForm(4, 2, width, causal=True, packed=True, rounded=True)
    check_packed(form, (2, 75), rng, close=ROUNDED)


@pytest.mark.parametrize(
    ("form", "sizes"),
    [
        (AttentionForm(6, 2, 64, causal=True, packed=True, rounded=True), (2, 133)),
        (AttentionForm(4, 4, 32, left=40, softcap=2.0, packed=True, rounded=True), (1, 77)),
    ],
    ids=["causal", "window-and-softcap"],
)
def test_tiles_multiply_what_is_rounded(
    form: AttentionForm,
    sizes: tuple[int, int],
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not host().avx512bf16:
        pytest.skip("this processor has no avx512_bf16")
    monkeypatch.setattr(amx, "Intrinsics", EmulatedTiles)
    features = replace(host(), amx_bf16=True)
    check_packed(form, sizes, rng, (features, "host"), close=ROUNDED)


def test_tiles_of_amx_multiply_what_is_rounded(rng: np.random.Generator) -> None:
    if not host().amx_bf16:
        pytest.skip("this processor has no amx_bf16")
    assert tiles_allowed()
    form = AttentionForm(4, 2, 64, causal=True, packed=True, rounded=True)
    check_packed(form, (2, 75), rng, close=ROUNDED)


def check_packed(
    form: AttentionForm,
    sizes: tuple[int, int],
    rng: np.random.Generator,
    on: tuple[Features, str] | None = None,
    close: float = CLOSE,
) -> None:
    batch, length = sizes
    features, mcpu = on or (host(), "host")
    heads, groups, width = form.heads, form.kv_heads, form.width
    qkv = floats(rng, batch * length, (heads + 2 * groups) * width)
    mask = padded(batch, length)
    kernel = attention(form, features)
    out = call(kernel, {"qkv": qkv, "mask": mask}, {"y": filled(rng, qkv, form)}, mcpu)["y"]
    parts = qkv.reshape(batch, length, -1, width)
    q, k, v = np.split(parts, [heads, heads + groups], axis=2)
    assert error(out.reshape(q.shape), attended(q, k, v, mask, form)) < close


def filled(rng: np.random.Generator, rows: Array, form: AttentionForm) -> Array:
    """Return what an output holds before: any numbers."""
    return floats(rng, len(rows), form.heads * form.width)


def test_keys_of_another_length(rng: np.random.Generator) -> None:
    form = AttentionForm(4, 2, 16)
    q, k, v = floats(rng, 3 * 5, 64), floats(rng, 3 * 39, 32), floats(rng, 3 * 39, 32)
    given = {"q": q, "k": k, "v": v, "mask": padded(3, 39)}
    out = call(attention(form, host()), given, {"y": filled(rng, q, form)})["y"]
    parts = q.reshape(3, 5, 4, 16), k.reshape(3, 39, 2, 16), v.reshape(3, 39, 2, 16)
    assert error(out.reshape(3, 5, 4, 16), attended(*parts, given["mask"], form)) < CLOSE


def test_a_row_that_sees_nothing_is_zero_and_others_are_right(rng: np.random.Generator) -> None:
    form = AttentionForm(2, 1, 8, packed=True)
    qkv, mask = floats(rng, 2 * 9, 32), np.ones((2, 9), np.int64)
    mask[1] = 0
    out = call(attention(form, host()), {"qkv": qkv, "mask": mask}, {"y": filled(rng, qkv, form)})
    assert not out["y"][9:].any()
    assert out["y"][:9].all()


@dataclass(frozen=True)
class Step:
    """New tokens with a cache: sizes, form and turning.

    Args:
        batch: B.
        past: P.
        new: S.
        form: The attention.
        turning: Norm and rotation.
    """

    batch: int
    past: int
    new: int
    form: AttentionForm
    rotation: Rotation

    @property
    def keys(self) -> int:
        """T."""
        return self.past + self.new

    def given(self, rng: np.random.Generator) -> dict[str, Array]:
        """Return inputs; what must not be read is NaN."""
        form, keys = self.form, self.keys
        caches = {}
        for name in ("k_cache", "v_cache"):
            caches[name] = floats(rng, self.batch, form.kv_heads, keys + 5, form.width)
            caches[name][:, :, self.past :] = np.nan
        mask = np.ones((self.batch, keys), np.int64)
        for b in range(self.batch):
            mask[b, : 2 * b] = 0
        half = max(self.rotation.rotary // 2, 1)
        return {
            **caches,
            "qkv": floats(
                rng, self.batch * self.new, (form.heads + 2 * form.kv_heads) * form.width
            ),
            "q_norm": floats(rng, form.width),
            "k_norm": floats(rng, form.width),
            "cos": floats(rng, keys + 9, half),
            "sin": floats(rng, keys + 9, half),
            "position_ids": rng.integers(0, keys + 9, (self.batch, self.new)),
            "mask": mask,
        }

    def wanted(self, given: dict[str, Array]) -> dict[str, Array]:
        """Return q, the caches and y after the step."""
        heads, groups, width = self.form.heads, self.form.kv_heads, self.form.width
        parts = given["qkv"].reshape(self.batch, self.new, -1, width)
        q, k, v = np.split(parts.astype(np.float64), [heads, heads + groups], axis=2)
        q, k = self.turned(q, given, "q_norm"), self.turned(k, given, "k_norm")
        caches = {}
        for name, fresh in (("k_cache", k), ("v_cache", v)):
            caches[name] = given[name][:, :, : self.keys].astype(np.float64)
            caches[name][:, :, self.past :] = fresh.transpose(0, 2, 1, 3)
        keys, values = (cache.transpose(0, 2, 1, 3) for cache in caches.values())
        y = attended(q, keys, values, given["mask"], self.form)
        rows = (self.batch * self.new, -1)
        return {**caches, "q": q.reshape(rows), "y": y.reshape(rows)}

    def turned(self, x: Array, given: dict[str, Array], weight: str) -> Array:
        """Return heads [B, S, heads, D] normed and rotated."""
        if self.rotation.norm is not None:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.rotation.norm) * given[weight]
        half = self.rotation.rotary // 2
        low, high = x[..., :half], x[..., half : 2 * half]
        at = given["position_ids"]
        cos, sin = (given[name][at][:, :, None, :half] for name in ("cos", "sin"))
        turned = [low * cos - high * sin, high * cos + low * sin, x[..., 2 * half :]]
        return np.concatenate(turned, axis=-1)


SMOLLM = Step(2, 60, 9, AttentionForm(6, 2, 64, causal=True, cached=True), Rotation(64, 64))
GEMMA = Step(
    3,
    7,
    4,
    AttentionForm(8, 1, 24, causal=True, cached=True, left=5, softcap=3.0),
    Rotation(24, 12, 1e-6),
)
GPT = Step(
    2,
    0,
    37,
    AttentionForm(4, 4, 16, causal=True, cached=True, masked=False, left=20),
    Rotation(16),
)
ODD = Step(1, 5, 3, AttentionForm(3, 1, 7, causal=True, cached=True), Rotation(7, 6))


@pytest.mark.parametrize("step", [SMOLLM, GEMMA, GPT, ODD], ids=["smollm", "gemma", "gpt", "odd"])
def test_new_tokens_are_turned_cached_and_attend(step: Step, rng: np.random.Generator) -> None:
    check_prefill(step, rng, host())


def test_new_tokens_attend_with_avx2_alone(rng: np.random.Generator) -> None:
    check_prefill(SMOLLM, rng, narrow(), AVX2)


def check_prefill(
    step: Step, rng: np.random.Generator, features: Features, mcpu: str = "host"
) -> None:
    given = step.given(rng)
    wanted, blank = step.wanted(given), filled(rng, given["qkv"], step.form)
    out = call(append(step.form, step.rotation, features), given, {"q": blank}, mcpu)
    for name in ("q", "k_cache", "v_cache"):
        got = out[name] if name == "q" else out[name][:, :, : step.keys]
        assert error(got, wanted[name]) < CLOSE, name
    after = {**given, **out}
    y = call(attention(step.form, features), after, {"y": blank}, mcpu)["y"]
    assert error(y, wanted["y"]) < CLOSE


DECODING = {
    "smollm": replace(SMOLLM, past=300, new=1),
    "gemma": replace(GEMMA, past=270, new=1),
    "gpt": replace(GPT, past=400, new=1, form=replace(GPT.form, left=150)),
    "odd": replace(ODD, new=1),
    "first": replace(SMOLLM, past=0, new=1, batch=1),
    "half a head is no whole vectors": Step(
        2, 9, 1, AttentionForm(4, 2, 80, causal=True, cached=True), Rotation(80, 80)
    ),
}


@pytest.mark.parametrize("name", DECODING)
def test_one_token_is_turned_cached_and_attends(name: str, rng: np.random.Generator) -> None:
    check_decode(DECODING[name], rng, host())


def test_one_token_attends_with_avx2_alone(rng: np.random.Generator) -> None:
    check_decode(DECODING["smollm"], rng, narrow(), AVX2)


def check_decode(
    step: Step, rng: np.random.Generator, features: Features, mcpu: str = "host"
) -> None:
    given = step.given(rng)
    wanted, blank = step.wanted(given), filled(rng, given["qkv"], step.form)
    out: dict[str, Any] = call(
        decode(step.form, step.rotation, features), given, {"y": blank}, mcpu
    )
    assert error(out["y"], wanted["y"]) < CLOSE
    for name in ("k_cache", "v_cache"):
        assert error(out[name][:, :, : step.keys], wanted[name]) < CLOSE
        assert np.isnan(out[name][:, :, step.keys :]).all()


def test_names_tell_functions_apart() -> None:
    forms = [step.form for step in DECODING.values()] + [replace(SMOLLM.form, scale=1.0)]
    turnings = {step.rotation for step in DECODING.values()}
    labels = {form.label for form in forms}
    assert len(labels) == len(set(forms))
    assert len({rotation.label for rotation in turnings}) == len(turnings)
    assert all(label.isidentifier() for label in labels)
