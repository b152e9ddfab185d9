"""When a warm-up is over, found in the samples themselves.

The first runs of a process are slower: pages are touched, pools of threads start, buffers grow,
the clock of the processor settles. How long that lasts nobody knows beforehand, so it is looked
for: the samples to leave out are those whose absence makes the mean of the rest surest. That is
the marginal standard error rule (MSER): of all counts d, the one where the variance of the
samples after the first d, divided by how many those are, is smallest. It is looked for among the
first half; where it would be the whole half, the samples were still falling.

Source: K. P. White, An effective truncation heuristic for bias reduction in simulation output,
Simulation 69(6), 1997.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

NEEDED: Final = 6
"""Samples below which nothing is seen of a warm-up."""


def warmups_in(samples: Sequence[float]) -> int | None:
    """Return how many first samples are warm-up; None where it may not be over, or none can tell.

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
