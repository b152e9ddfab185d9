"""Statistics of latencies: the median, its interval, percentiles and outliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from llmopt.errors import UsageError

NEEDED: Final = {50: 1, 90: 64, 99: 662}
"""Samples below which a percentile is noise: see docs on the latency gate."""
_TO_SIGMA: Final = 0.6745  # the median absolute deviation of a normal distribution, in sigmas
_CUTOFF: Final = 3.5
_MIN_SAMPLES: Final = 6  # with fewer, the width of the noise is unknown


def median(samples: Sequence[float]) -> float:
    """Return the middle value, or the mean of the two middle values.

    >>> median([3, 1, 2]), median([1, 2, 3, 5])
    (2, 2.5)
    """
    ordered = sorted(samples)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def median_interval(
    samples: Sequence[float], confidence: float = 0.95
) -> tuple[float, float] | None:
    """Return two order statistics between which the true median lies; None for too few samples.

    The interval holds for any distribution: the number of samples below the median is binomial,
    so the narrowest symmetric pair of ranks with enough probability between them is an interval.
    Source: H. A. David, H. N. Nagaraja, Order Statistics, 2003, section 7.1.

    Args:
        samples: Independent measurements.
        confidence: Probability that the interval covers the median.

    >>> median_interval([1, 2, 3, 4, 5])  # 5 samples cover the median in 1 - 2/32 = 93.75 %
    >>> median_interval([1, 2, 3, 4, 5, 6])
    (1, 6)
    """
    ordered = sorted(samples)
    rank = _rank(len(ordered), (1 - confidence) / 2)
    return None if rank is None else (ordered[rank], ordered[-1 - rank])


def percentile(samples: Sequence[float], percent: int) -> float | None:
    """Return a percentile (nearest rank), or None for too few samples.

    Raises:
        UsageError: ``percent`` is not 50, 90 or 99.

    >>> percentile(range(100), 90), percentile(range(100), 99)
    (89, None)
    """
    if percent not in NEEDED:
        raise UsageError(
            f"unsupported percentile {percent}; use one of {', '.join(map(str, NEEDED))}"
        )
    if len(samples) < NEEDED[percent]:
        return None
    return sorted(samples)[math.ceil(len(samples) * percent / 100) - 1]


def outliers(samples: Sequence[float]) -> tuple[int, ...]:
    """Return the indices of the outliers, by the modified z-score.

    An outlier is further from the median than 3.5 / 0.6745 times the median absolute deviation.
    It is flagged and stays in: the median is robust to it, and the samples should show what the
    machine did.
    Source: B. Iglewicz, D. C. Hoaglin, How to detect and handle outliers, 1993, page 11.

    >>> outliers([10.0, 10.1, 9.9, 10.2, 9.8, 17.0])
    (5,)
    """
    if len(samples) < _MIN_SAMPLES:
        return ()
    middle = median(samples)
    distances = [abs(sample - middle) for sample in samples]
    deviation = median(distances)
    if deviation == 0:  # half of them are equal: the width of the noise is unknown
        return ()
    return tuple(i for i, far in enumerate(distances) if _TO_SIGMA * far > _CUTOFF * deviation)


def _rank(count: int, tail: float) -> int | None:
    """Return the highest r with P(Binomial(count, 1/2) <= r) <= tail; None if there is none."""
    best, below = None, 0.0
    for rank in range(count // 2):
        below += math.comb(count, rank) / 2.0**count
        if below > tail:
            break
        best = rank
    return best
