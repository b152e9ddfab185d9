"""Search for scales with less error than the one that makes the extreme exact.

For a block x, a scale d and codes q, the nearest to x / d in the range, the search minimizes::

    E(d) = sum over k of w[k] * (x[k] - d * q[k])**2
    w[k] = v[k] * sqrt(mean(x**2) + x[k]**2)

``v`` is the importance of a column: the mean square of its activations, or 1 if not measured. The
root estimates it from the weight alone: columns with large activations tend to have large weights.

A trial scale determines codes; the best scale for those codes follows in closed form::

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
BlockColumns = NDArray[np.float32]
"""Values [block, n]: a column is a block, so that sums over blocks are sums of rows."""

TRIALS: Final = (17 / 16, 15 / 16, 7 / 8)
"""Share of the range of codes that the extreme takes in a trial: 7/8 is code 7 of 8; beyond 1 it
saturates. On normal values these leave 1.3 % more error than 34 trials do, of which scales of the
other sign save 0.2 %."""
_CERTAIN: Final = 1e-5  # relative: precision of errors in float32


def search_scales(
    values: NDArray[np.float32],
    near: Scales,
    scheme: Blockwise,
    importance: NDArray[np.float32] | None = None,
) -> Scales:
    """Return the scale of each block, of the type of ``near``.

    A scale depends on its block alone, not on the other blocks in the call.

    Args:
        values: [n, block] float32, finite.
        near: [n], not 0: scales that make the extremes exact, as stored.
        scheme: Symmetric scheme.
        importance: [n, block] float32, > 0: importance of each column; None for equal ones.
    """
    blocks = _Blocks(values, near.astype(np.float32), scheme, importance)
    saved, ratio = blocks.fit(np.float32(1))
    for trial in TRIALS:
        gain, fitting = blocks.fit(np.float32(trial))
        np.copyto(ratio, fitting, where=gain > saved)
        np.maximum(saved, gain, out=saved)
    with np.errstate(over="ignore"):  # infinite scales are discarded
        candidates = (near.astype(np.float64) * ratio[: len(near)]).astype(near.dtype)
    usable = np.isfinite(candidates) & (candidates != 0)
    candidates = np.where(usable, candidates, near)
    better = blocks.error(candidates) < blocks.error(near) * (1 - _CERTAIN)
    return np.where(better, candidates, near)


class _Blocks:
    """Blocks in units of their usual scales, and scratch memory.

    Args:
        values: [n, block] float32.
        near: [n] float32, not 0.
        scheme: Scheme that defines the range of codes.
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
        # numpy sums a single column in another order than several columns
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

    def fit(self, trial: np.float32) -> tuple[BlockColumns, BlockColumns]:
        """Return the error [n] that the codes of a trial save, and the scale for them [n].

        The scale is a multiple of the usual one.
        """
        self._choose(np.multiply(self.units, trial, out=self.codes))
        first = np.multiply(self.weighted, self.codes, out=self.work).sum(axis=0)
        np.multiply(self.codes, self.codes, out=self.codes)
        second = np.multiply(self.weights, self.codes, out=self.work).sum(axis=0)
        np.maximum(second, np.finfo(np.float32).tiny, out=second)  # all codes may be 0
        ratio = first / second
        return first * ratio, ratio

    def error(self, scale: Scales) -> BlockColumns:
        """Return the error of each block [n], for scales [n] as stored."""
        ratio = np.ones(self.units.shape[1], np.float32)
        ratio[: len(scale)] = scale.astype(np.float32) / self.near
        self._choose(np.divide(self.units, ratio, out=self.codes))
        np.multiply(self.codes, ratio, out=self.codes)
        np.subtract(self.codes, self.units, out=self.codes)
        np.multiply(self.codes, self.codes, out=self.codes)
        error: BlockColumns = np.multiply(self.codes, self.weights, out=self.codes).sum(axis=0)
        return error[: len(scale)]

    def _choose(self, units: BlockColumns) -> None:
        """Round values to codes, in place."""
        np.rint(units, out=units)
        np.clip(units, self.low, self.high, out=units)
