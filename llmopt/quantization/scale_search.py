"""Scales that fit their blocks better than the one which makes the extreme exact.

For a block x, a scale d and codes q, the nearest to x / d in the range, what is minimized is::

    E(d) = sum over k of w[k] * (x[k] - d * q[k])**2
    w[k] = v[k] * sqrt(mean(x**2) + x[k]**2)

``v`` is how much a column matters: the mean square of the activations that meet it, or 1 where
nobody measured. The root is a guess at it from the weight alone: columns that large activations
meet tend to hold large weights.

A trial scale chooses codes; the scale that fits those codes best follows in closed form::

    d = sum of w * x * q  /  sum of w * q**2

Of all trials, and of the scale that makes the extreme exact, the one with the least error wins;
errors are those of scales as stored and of the codes nearest to them.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from llmopt.quantization.schemes import Blockwise

Scales = NDArray[np.floating[Any]]
Turned = NDArray[np.float32]
"""Values [block, n]: a column is a block, so that sums over blocks are sums of rows."""

TRIALS: Final = (17 / 16, 15 / 16, 7 / 8)
"""How much of the range of codes a trial lets the extreme take: 7/8 is code 7 of 8; beyond 1 it
saturates. On normal values these leave 1.3 % more error than 34 trials do, of which scales of the
other sign save 0.2 %."""
_CERTAIN: Final = 1e-5  # relative: errors in float32 are no more certain


def search_scales(
    values: NDArray[np.float32],
    near: Scales,
    scheme: Blockwise,
    importance: NDArray[np.float32] | None = None,
) -> Scales:
    """Return the scale of each block, of the type of ``near``.

    It depends on its block alone, whatever else is searched with it.

    Args:
        values: [n, block] float32, finite.
        near: [n], none of them 0: the scales that make the extremes exact, as stored.
        scheme: Symmetric.
        importance: [n, block] float32, > 0: how much each column matters; None for all the same.
    """
    blocks = _Blocks(values, near.astype(np.float32), scheme, importance)
    saved, ratio = blocks.fit(np.float32(1))
    for trial in TRIALS:
        more, fitting = blocks.fit(np.float32(trial))
        np.copyto(ratio, fitting, where=more > saved)
        np.maximum(saved, more, out=saved)
    with np.errstate(over="ignore"):  # what turns infinite is not taken
        wanted = (near.astype(np.float64) * ratio[: len(near)]).astype(near.dtype)
    usable = np.isfinite(wanted) & (wanted != 0)
    wanted = np.where(usable, wanted, near)
    better = blocks.error(wanted) < blocks.error(near) * (1 - _CERTAIN)
    return np.where(better, wanted, near)


class _Blocks:
    """Blocks in units of their usual scales, and memory to work in.

    Args:
        values: [n, block] float32.
        near: [n] float32, not 0.
        scheme: Scheme that defines the codes.
        importance: [n, block] float32, or None.
    """

    def __init__(
        self,
        values: NDArray[np.float32],
        near: NDArray[np.float32],
        scheme: Blockwise,
        importance: NDArray[np.float32] | None,
    ) -> None:
        self.low, self.high = -scheme.middle, scheme.middle - 1
        count = len(values)
        # numpy sums a column that is alone in another order than columns side by side
        shape = (scheme.block, max(2, count))
        self.near = near
        self.units = np.zeros(shape, np.float32)
        np.divide(values.T, near, out=self.units[:, :count])
        self.weights = np.square(self.units)
        np.add(self.weights, self.weights.sum(axis=0) / np.float32(scheme.block), out=self.weights)
        np.sqrt(self.weights, out=self.weights)
        if importance is not None:
            self.weights[:, :count] *= importance.T
        self.weighted = self.weights * self.units
        self.codes = np.empty(shape, np.float32)
        self.work = np.empty(shape, np.float32)

    def fit(self, trial: np.float32) -> tuple[Turned, Turned]:
        """Return what the codes of a trial save of the error [n], and the scale that does it [n].

        The scale is a multiple of the usual one.
        """
        self._choose(np.multiply(self.units, trial, out=self.codes))
        first = np.multiply(self.weighted, self.codes, out=self.work).sum(axis=0)
        np.multiply(self.codes, self.codes, out=self.codes)
        second = np.multiply(self.weights, self.codes, out=self.work).sum(axis=0)
        np.maximum(second, np.finfo(np.float32).tiny, out=second)  # all codes 0 save nothing
        ratio = first / second
        return first * ratio, ratio

    def error(self, scale: Scales) -> Turned:
        """Return the error of each block [n], for scales [n] as stored."""
        ratio = np.ones(self.units.shape[1], np.float32)
        ratio[: len(scale)] = scale.astype(np.float32) / self.near
        self._choose(np.divide(self.units, ratio, out=self.codes))
        np.multiply(self.codes, ratio, out=self.codes)
        np.subtract(self.codes, self.units, out=self.codes)
        np.multiply(self.codes, self.codes, out=self.codes)
        error: Turned = np.multiply(self.codes, self.weights, out=self.codes).sum(axis=0)
        return error[: len(scale)]

    def _choose(self, units: Turned) -> None:
        """Round values to codes, in place."""
        np.rint(units, out=units)
        np.clip(units, self.low, self.high, out=units)
