"""Statistics of the gate: log ratios, their standard errors, and the cost of interim looks.

Blocks of one process are correlated (by its memory layout, its cores), so the sampling unit is the
process, not the block. Everything is on logarithms: a ratio of 1.05 one way is 1 / 1.05 the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
"""One row per process (or pair), one column per block; NaN pads short rows."""

FALSE_ALARMS: Final = 0.005
"""The false positive rate of a check, over all its looks and comparisons."""
MISSES: Final = 0.05
"""The false negative rate of a comparison, over all its looks."""
_RESAMPLES: Final = 1000
_LARGEST: Final = 1 << 21
"""Numbers resampled at once: sixteen megabytes of each kind."""
_NEIGHBOURS: Final = 41
"""Pairs of blocks of similar duration, from which the precision of one is estimated."""
_FLOOR: Final = 0.003
"""Floor of that deviation, lest a few pairs equal by chance outweigh all others."""


@dataclass(frozen=True)
class LogRatio:
    """A log ratio and its standard error.

    Args:
        value: Median.
        error: Standard error; infinite for a single process.
        freedom: Degrees of freedom: processes less one.
    """

    value: float
    error: float
    freedom: int

    def above(self, bound: float) -> float:
        """Return the chance of a value this high if the truth were ``bound`` or lower."""
        return student_tail(self._distance(bound), self.freedom)

    def below(self, bound: float) -> float:
        """Return the chance of a value this low if the truth were ``bound`` or higher."""
        return student_tail(-self._distance(bound), self.freedom)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the bounds between which the truth lies with ``confidence``."""
        half = self.half_width((1 - confidence) / 2)
        return self.value - half, self.value + half

    def half_width(self, tail: float) -> float:
        """Return the distance of the bound with probability ``tail`` beyond it."""
        return student_quantile(tail, self.freedom) * self.error if self.freedom else math.inf

    def detectable(self) -> float:
        """Return the smallest change that a check of this precision detects 19 times in 20."""
        return self.half_width(FALSE_ALARMS) + self.half_width(MISSES)

    def _distance(self, bound: float) -> float:
        if not self.freedom or self.error == math.inf:
            return 0.0
        gap = self.value - bound
        if self.error == 0:
            return math.copysign(math.inf, gap) if gap else 0.0
        return gap / self.error


def estimate(blocks: Matrix, weights: Matrix | None = None, seed: int = 0) -> LogRatio:
    """Return the median of all blocks, with its error from a hierarchical bootstrap.

    Resampling processes and then their blocks counts the variance within processes twice, because
    it is part of the variance between processes too; that of resampling blocks alone is subtracted.
    The bootstrap gives the standard error, and Student's t with one degree of freedom fewer than
    processes the bounds: percentiles of a bootstrap of eight processes are too narrow.
    Source: A. C. Davison, D. V. Hinkley, Bootstrap Methods and their Application, 1997, section
    3.8 (hierarchical data); T. C. Hesterberg, What Teachers Should Know About the Bootstrap, The
    American Statistician 69 (2015), section 5 (how narrow percentiles are).

    Args:
        blocks: [processes, blocks] logarithms.
        weights: [processes, blocks] > 0; None for equal weights.
        seed: Seed of the resampling.

    >>> estimate(np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]))
    LogRatio(value=1.0, error=0.0, freedom=2)
    """
    weights = np.ones_like(blocks) if weights is None else weights
    value, freedom = weighted_median(blocks, weights), len(blocks) - 1
    if freedom < 1:
        return LogRatio(value, math.inf, 0)
    both = float(resampled(blocks, weights, seed).var(ddof=1))
    within = float(resampled(blocks, weights, seed + 1, processes=False).var(ddof=1))
    return LogRatio(value, math.sqrt(max(both - within, both / 2)), freedom)


def difference(left: Matrix, right: Matrix, seed: int = 0) -> LogRatio:
    """Return the difference of the medians of ``left`` and ``right``, unpaired."""
    one, other = estimate(left, seed=seed), estimate(right, seed=seed + 1)
    error, freedom = math.hypot(one.error, other.error), min(one.freedom, other.freedom)
    return LogRatio(one.value - other.value, error, freedom)


def quietness(left: Matrix, right: Matrix) -> Matrix:
    """Return the weight of each pair of blocks: the larger, the quieter the machine was.

    Other load slows both blocks of a pair and makes their ratio noisy. Pairs are sorted by their
    total duration, and each is weighted by the inverse of the median absolute deviation of ratios
    among its neighbours, which minimizes the error of a weighted median. Neither the duration nor
    the deviation depends on which side is slower, so without a difference the ratio stays as likely
    above 1 as below.

    Args:
        left: [processes, blocks] logarithms of one side.
        right: [processes, blocks] logarithms of the other.
    """
    ratios = left - right
    known = np.isfinite(ratios)
    order = np.argsort((left + right)[known])
    deviations = np.abs(ratios[known] - np.median(ratios[known]))[order]
    width = min(_NEIGHBOURS, len(deviations)) | 1  # odd
    padded = np.pad(deviations, width // 2, "reflect")
    around = np.lib.stride_tricks.sliding_window_view(padded, width)
    weights = np.ones_like(left)
    weights[known] = (1 / (_FLOOR + np.median(around, axis=-1)))[np.argsort(order)]
    return weights


def weighted_median(values: Matrix, weights: Matrix) -> float:
    """Return the value with half of the weight on either side, or the mean of two such.

    >>> weighted_median(np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 3.0]))
    2.0
    >>> weighted_median(np.array([1.0, 2.0]), np.array([1.0, 1.0]))
    1.5
    """
    known = np.isfinite(values)
    order = np.argsort(values[known])
    sums = weights[known][order].cumsum()[None]
    return float(_halves(values[known][order], sums)[0])


def resampled(blocks: Matrix, weights: Matrix, seed: int, *, processes: bool = True) -> Matrix:
    """Return weighted medians of bootstrap samples of blocks, and of processes if asked."""
    random = np.random.default_rng(seed)
    rows, columns = blocks.shape
    lengths = np.isfinite(blocks).sum(axis=1)
    order = np.argsort(blocks, axis=None)  # NaN comes last
    total = int(lengths.sum())
    ordered, weight = blocks.ravel()[order][:total], weights.ravel()[order][:total]
    rank = np.argsort(order)  # of each block
    at_once = max(1, _LARGEST // blocks.size)
    medians = []
    for start in range(0, _RESAMPLES, at_once):
        count = min(at_once, _RESAMPLES - start)
        process = np.arange(rows)[None, :, None]
        if processes:
            process = random.integers(rows, size=(count, rows, 1))
        length = lengths[process]
        block = (random.random((count, rows, columns), np.float32) * length).astype(np.int64)
        # A process has `length` blocks; draws beyond them go to a bin that is dropped.
        drawn = np.where(np.arange(columns) < length, rank[process * columns + block], total)
        first = np.arange(count)[:, None] * (total + 1)
        flat = (drawn.reshape(count, -1) + first).ravel()
        times = np.bincount(flat, minlength=count * (total + 1)).reshape(count, -1)[:, :total]
        medians.append(_halves(ordered, (times * weight).cumsum(axis=1)))
    return np.concatenate(medians)


def _halves(ordered: Matrix, sums: Matrix) -> Matrix:
    """Return the value at which each row of cumulative weights reaches half of its total."""
    half = sums[:, -1:] / 2
    slack = 1e-9 * half
    low = (sums >= half - slack).argmax(axis=1)
    high = (sums > half + slack).argmax(axis=1)
    middles: Matrix = (ordered[low] + ordered[high]) / 2
    return middles


def spent(budget: float, fraction: float) -> float:
    """Return the part of an error budget that may be spent after a fraction of the time.

    Its increase since the last look is the level of a look: the error rates of all looks add up to
    at most the budget, however correlated the looks are.
    Source: K. K. G. Lan, D. L. DeMets, Discrete sequential boundaries for clinical trials,
    Biometrika 70 (1983), 659-663: the spending function of Pocock's type.

    >>> spent(0.05, 0), round(spent(0.05, 0.5), 4), spent(0.05, 1), spent(0.05, 2)
    (0.0, 0.031, 0.05, 0.05)
    """
    return budget * math.log(1 + (math.e - 1) * min(max(fraction, 0.0), 1.0))


def holm(chances: Sequence[float], level: float) -> list[bool]:
    """Return which hypotheses are rejected at family-wise error rate ``level``.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian
    Journal of Statistics 6 (1979), 65-70.

    >>> holm([0.01, 0.04, 0.03], 0.05)  # 0.01 < 0.05 / 3; 0.03 > 0.05 / 2, and there it ends
    [True, False, False]
    """
    rejected = [False] * len(chances)
    order = sorted(range(len(chances)), key=chances.__getitem__)
    for rank, index in enumerate(order):
        if chances[index] >= level / (len(chances) - rank):
            break
        rejected[index] = True
    return rejected


def student_tail(distance: float, freedom: int) -> float:
    """Return the probability that Student's t exceeds ``distance``.

    Source: M. Abramowitz, I. A. Stegun, Handbook of Mathematical Functions, 1964, 26.7.3-4.

    >>> round(student_tail(1.8946, 7), 4), student_tail(0.0, 7), student_tail(math.inf, 7)
    (0.05, 0.5, 0.0)
    """
    if freedom < 1:
        return 0.5
    if math.isinf(distance):
        return 0.0 if distance > 0 else 1.0
    # Far out, 1 - (almost 1) loses digits, but none that a level depends on.
    angle = math.atan(distance / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for step in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (step + 1) / (step + 2)
    between = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(max((1 - between) / 2, 0.0), 1.0)


def student_quantile(tail: float, freedom: int) -> float:
    """Return the distance that Student's t exceeds with probability ``tail``, at most one half.

    >>> round(student_quantile(0.025, 7), 3), round(student_quantile(0.005, 15), 3)
    (2.365, 2.947)
    """
    low, high = 0.0, 1.0
    while student_tail(high, freedom) > tail and high < 1e6:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, freedom) > tail else (low, middle)
    return high
