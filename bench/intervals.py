"""How sure a median is: one bootstrap for all suites."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

DRAWS = 4000


def median_interval(samples: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return a 95 % interval of the median of [groups, samples].

    Groups are drawn with replacement, then samples within each: those of one process or block
    resemble each other.

    >>> median_interval(np.arange(7.0)[:, None])
    (1.0, 5.0)
    """
    rng = np.random.default_rng(0)
    groups, count = samples.shape
    medians = []
    for _ in range(DRAWS):
        chosen = samples[rng.integers(0, groups, groups)]
        within = rng.integers(0, count, (groups, count))
        medians.append(np.median(np.take_along_axis(chosen, within, axis=1)))
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)
