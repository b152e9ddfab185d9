"""Detection of the end of the warm-up, from the samples themselves.

The first runs of a process are slower: pages are touched, thread pools start, buffers grow, the
clock settles. How long that lasts is not known beforehand, so it is estimated with the marginal
standard error rule (MSER): of all counts d, discard the first d samples for which the variance of
the remaining ones, divided by their number, is smallest. The search covers the first half; a
minimum at its end means that the samples were still falling.

Source: K. P. White, An effective truncation heuristic for bias reduction in simulation output,
Simulation 69(6), 1997.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

NEEDED: Final = 6
"""The fewest samples in which a warm-up can be detected."""


def warmups_in(samples: Sequence[float]) -> int | None:
    """Return the number of warm-up samples; None if it may not be over, or for too few samples.

    >>> warmups_in([3.0, 1.4, 1.0, 1.1, 1.0, 1.0, 1.1, 1.0])
    2
    >>> warmups_in([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]) is None
    True
    """
    count = len(samples)
    if count < NEEDED:
        return None
    errors = [_marginal_error(samples[d:]) for d in range(count // 2 + 1)]
    best = errors.index(min(errors))
    return best if best < count // 2 else None


def _marginal_error(samples: Sequence[float]) -> float:
    mean = sum(samples) / len(samples)
    return sum((sample - mean) ** 2 for sample in samples) / len(samples) ** 2
