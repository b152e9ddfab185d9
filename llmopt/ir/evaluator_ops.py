"""Operators that onnx's reference evaluator gets wrong, as ONNX states them.

Each is a class of the evaluator's own kind: called with arrays, it returns a tuple of arrays.

- *Attention*: the evaluator takes a causal mask of as many queries as the mask has rows, and a
  mask of padding has one row for all of them.
- *RMSNormalization*, *LayerNormalization*: ``stash_type`` says that means and squares are of
  float32, where the evaluator computes them in the type of its input: 1000 squared is infinite
  in float16.
- *GatherElements*: the evaluator gathers from at most 64 rows, numpy's limit of choices.
- *MatMul* of 16 bits is right, and a hundred times slower than numpy is with 32. Here it is the
  same sum, of float32, rounded once.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_attention, op_matmul
from typing_extensions import override

from llmopt.interface.arrays import Array

_WIDE: Final = 1  # onnx.TensorProto.FLOAT
_NARROW: Final = ("float16", "bfloat16")


class Attention(op_attention.Attention_25):  # type: ignore[misc] # onnx has no types here
    """Attention whose mask may have one row for all queries."""

    op_domain = ""

    @override
    def _run(
        self, q: Array, k: Array, v: Array, mask: Array | None = None, *rest: Any, **attributes: Any
    ) -> tuple[Array, ...]:
        """Return the output, and present key, present value and scores.

        Args:
            q: [B, S, H*D], or [B, H, S, D].
            k: Keys, of as many axes.
            v: Values, of as many axes.
            mask: Broadcasts to [B, H, S, T]; boolean, or added to the scores.
            rest: Past key, past value and the count of real keys.
            attributes: Attributes of the operator.
        """
        rows = q.shape[-2]
        if mask is not None and (mask.ndim == 1 or mask.shape[-2] == 1):
            mask = np.broadcast_to(mask, (*mask.shape[:-2], rows, mask.shape[-1]))
        found: tuple[Array, ...] = super()._run(q, k, v, mask, *rest, **attributes)
        return found


class RMSNormalization(OpRun):  # type: ignore[misc] # as above
    """A norm whose squares and mean are of float32."""

    op_domain = ""

    @override
    def _run(
        self, x: Array, scale: Array, *, axis: int, epsilon: float, stash_type: int
    ) -> tuple[Array]:
        """Return ``x`` [.., E] over its root mean square, in the type of ``scale``."""
        _refuse_other(stash_type)
        wide = x.astype(np.float32)
        square = np.mean(wide * wide, axis=_last(x, axis), keepdims=True)
        normed = (wide / np.sqrt(square + epsilon)).astype(x.dtype)
        return ((normed * scale).astype(scale.dtype),)


class LayerNormalization(OpRun):  # type: ignore[misc] # as above
    """A norm whose mean and variance are of float32."""

    op_domain = ""

    @override
    def _run(
        self,
        x: Array,
        scale: Array,
        bias: Array | None = None,
        *,
        axis: int,
        epsilon: float,
        stash_type: int,
    ) -> tuple[Array, Array, Array]:
        """Return ``x`` [.., E] less its mean over its deviation, the mean, and 1 / deviation."""
        _refuse_other(stash_type)
        wide, axes = x.astype(np.float32), _last(x, axis)
        mean = np.mean(wide, axis=axes, keepdims=True)
        apart = wide - mean
        inverse = 1 / np.sqrt(np.mean(apart * apart, axis=axes, keepdims=True) + epsilon)
        found = (apart * inverse).astype(x.dtype) * scale
        return (found if bias is None else found + bias), mean, inverse


class MatMul(op_matmul.MatMul):  # type: ignore[misc] # as above
    """A product whose sums are of float32."""

    op_domain = ""

    @override
    def _run(self, a: Array, b: Array) -> tuple[Array]:
        """Return the product of ``a`` [.., M, K] and ``b`` [.., K, N] in their type."""
        if a.dtype.name not in _NARROW:
            return (op_matmul.numpy_matmul(a, b),)
        return (np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(a.dtype),)


class GatherElements(OpRun):  # type: ignore[misc] # as above
    """Rows gathered from any number of them."""

    op_domain = ""

    @override
    def _run(self, data: Array, indices: Array, *, axis: int) -> tuple[Array]:
        """Return ``data[.., indices, ..]``, one number for each index; negative ones count back."""
        others = tuple(slice(size) for size in indices.shape)
        cut = tuple(slice(None) if n == axis % data.ndim else o for n, o in enumerate(others))
        return (np.take_along_axis(data[cut], indices.astype(np.int64), axis),)


CORRECTED: Final = (Attention, GatherElements, RMSNormalization, LayerNormalization, MatMul)


def _last(x: Array, axis: int) -> tuple[int, ...]:
    """Return every axis from ``axis`` on."""
    return tuple(range(axis % x.ndim, x.ndim))


def _refuse_other(stash_type: int) -> None:
    if stash_type != _WIDE:
        raise NotImplementedError(f"stash_type={stash_type}: only float32 (1) is computed")
