"""Ranges of activations, observed on calibration data, for static scales.

``percentile`` 100 is min-max: the largest observed magnitude. A lower percentile p lets the largest
100 - p percent of magnitudes saturate, so that the others are rounded more finely.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from llmopt.errors import UnsupportedModelError, UsageError
from llmopt.interface.arrays import Array

_ROWS: Final = 64  # kept of each array
_TINY: Final = 1e-6  # range of a channel that is always zero


@dataclass
class Observer:
    """Observed magnitudes of each activation, channel by channel.

    Args:
        percentile: Percentage of a channel's magnitudes that its range covers, 50 … 100.

    Raises:
        UsageError: The percentile is out of range.
    """

    percentile: float = 100.0
    _largest: dict[str, Array] = field(default_factory=dict)
    _rows: dict[str, list[Array]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a percentile out of range."""
        if not 50.0 <= self.percentile <= 100.0:
            raise UsageError(f"percentile={self.percentile:g}: choose one from 50 to 100")

    def add(self, name: str, array: Array) -> None:
        """Record the magnitudes of one activation [.., K] in one batch.

        Raises:
            UnsupportedModelError: A value is not finite.
        """
        rows = np.abs(array.astype(np.float32)).reshape(-1, array.shape[-1])
        largest = rows.max(axis=0)
        if not np.all(np.isfinite(largest)):
            hint = "calibrate on data that the model computes without overflow"
            raise UnsupportedModelError(
                name, ["it became NaN or infinite during calibration"], hint
            )
        self._largest[name] = np.maximum(largest, self._largest.get(name, 0.0))
        self._rows.setdefault(name, []).append(_sampled(rows, name))

    def rows(self, name: str) -> Array:
        """Return magnitudes of a sample of the observed tokens, [N, K] float32."""
        return np.concatenate(self._rows[name])

    def ranges(self) -> Mapping[str, Array]:
        """Return the magnitude to cover of each channel, [K] float32, > 0.

        >>> seen = Observer()
        >>> seen.add("x", np.array([[1.0, -2.0], [-3.0, 0.0]]))
        >>> seen.ranges()["x"].tolist()
        [3.0, 2.0]
        """
        if self.percentile == 100.0:
            return {name: np.maximum(sizes, _TINY) for name, sizes in self._largest.items()}
        return {
            name: np.maximum(np.percentile(np.concatenate(parts), self.percentile, axis=0), _TINY)
            for name, parts in self._rows.items()
        }


def loss(rows: Array, rounded: Array) -> float:
    """Return the relative rounding error: mean of |x - q|^2 / |x|^2 over tokens.

    >>> loss(np.array([[3.0, 4.0]]), np.array([[3.0, 3.0]]))
    0.04

    Args:
        rows: [N, K].
        rounded: [N, K], the rows after rounding.
    """
    size = np.maximum(np.sum(rows**2, axis=1), _TINY)
    return float(np.mean(np.sum((rows - rounded) ** 2, axis=1) / size))


def smoothing(activations: Array, weights: Array) -> Array:
    """Return the factor by which each channel's range moves from activations to weights.

    Activations are divided by it and weights multiplied, so that both are equally hard to round:
    ``sqrt(max|x| / max|w|)``, with geometric mean 1.

    >>> smoothing(np.array([8.0, 0.5]), np.array([0.5, 0.5])).tolist()
    [2.0, 0.5]

    Args:
        activations: [K], the range of each channel, > 0.
        weights: [K], the largest magnitude of the weights of each channel.

    Source: G. Xiao et al., SmoothQuant, 2023, https://arxiv.org/abs/2211.10438, equation 4 with
    alpha 0.5.
    """
    ratio = np.sqrt(activations / np.maximum(weights, _TINY))
    return np.asarray((ratio / np.exp(np.mean(np.log(ratio)))).astype(np.float32))


def _sampled(rows: Array, name: str) -> Array:
    """Return at most 64 of the rows, drawn by the name alone."""
    if len(rows) <= _ROWS:
        return rows
    drawn = np.random.default_rng(zlib.crc32(name.encode())).integers(0, len(rows), _ROWS)
    return rows[drawn]
