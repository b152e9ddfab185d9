"""Quality of a candidate's logits against a reference's: streaming, arrays only.

Positions arrive in chunks of any size and are not kept, except a few float64 sums and one float64
per position, for the percentile. Over positions i with next token t_i::

    KL_i        = sum over v of p_i[v] * (ln p_i[v] - ln q_i[v])      nats; p reference, q candidate
    top-1       = share of positions with argmax p_i = argmax q_i
    perplexity  = exp(mean of -ln p_i[t_i])

Standard errors assume independent positions: they are a little too small for running text.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmopt.errors import AccuracyError
from llmopt.quantization.numerics import Floats

P99_SAMPLES: Final = 662  # fewer have no 95 % confidence interval of the 99th percentile
_OVERFLOWS: Final = "logits overflowed: keep more of the model in float, or use bf16"
_WORKING: Final = 1 << 20  # logits processed at once: 8 MB of float64


@dataclass(frozen=True)
class Estimate:
    """A number measured on a sample.

    Args:
        value: Estimate.
        error: Standard error; None from one sample.
    """

    value: float
    error: float | None


@dataclass(frozen=True)
class Quality:
    """Quality of a candidate against its reference.

    Args:
        samples: Number of positions compared.
        kl_mean: Mean KL(reference || candidate), nats, ≥ 0.
        kl_p99: 99th percentile of the KL; None from fewer than 662 positions.
        top1: Share of positions where both have the same most likely token, 0 … 1.
        perplexity: Perplexity of the candidate; None without next tokens, or if it overflows.
        perplexity_reference: Perplexity of the reference on the same tokens.
    """

    samples: int
    kl_mean: Estimate
    kl_p99: Estimate | None
    top1: Estimate
    perplexity: Estimate | None
    perplexity_reference: Estimate | None

    def to_json(self) -> str:
        """Return one JSON object; null for values that could not be measured."""
        return json.dumps(asdict(self))


@dataclass
class _Moments:
    """A running mean and variance (Chan, Golub, LeVeque 1979): no cancellation in long sums."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        if not len(values):
            return
        mean, total = float(values.mean()), self.count + len(values)
        shift = mean - self.mean
        self.squares += float(np.square(values - mean).sum())
        self.squares += shift * shift * self.count * len(values) / total
        self.mean += shift * len(values) / total
        self.count = total

    @property
    def error(self) -> float | None:
        if self.count < 2:
            return None
        return float(np.sqrt(self.squares / (self.count - 1) / self.count))


class QualityMeter:
    """Accumulates positions and computes the quality.

    >>> meter = QualityMeter()
    >>> logits = np.array([[2.0, 1.0, 0.0]], np.float32)
    >>> meter.add(logits, logits + 5, np.array([0]))
    >>> quality = meter.result()
    >>> quality.samples, round(quality.kl_mean.value, 9), quality.top1.value, quality.kl_p99
    (1, 0.0, 1.0, None)
    >>> round(quality.perplexity.value, 4)
    1.5032
    """

    def __init__(self) -> None:
        self._divergences: list[NDArray[np.float64]] = []
        self._divergence = _Moments()
        self._same = _Moments()
        self._surprise = _Moments()
        self._surprise_reference = _Moments()

    def add(
        self, reference: Floats, candidate: Floats, next_tokens: NDArray[np.integer] | None = None
    ) -> None:
        """Add positions.

        Args:
            reference: Logits [N, V], any float type.
            candidate: Logits [N, V].
            next_tokens: [N] next tokens of the text; negative where there is none.

        Raises:
            AccuracyError: Logits are NaN or +infinity, or the candidate rules out a token that
                the reference does not: the mean would be infinite.
            ValueError: The shapes do not match.
        """
        tokens = np.full(len(reference), -1) if next_tokens is None else np.asarray(next_tokens)
        if reference.ndim != 2 or reference.shape != candidate.shape or not reference.shape[1]:
            raise ValueError(f"logits {reference.shape} and {candidate.shape}: two [N, V] needed")
        if tokens.shape != reference.shape[:1]:
            raise ValueError(f"next tokens {tokens.shape}: one for each of {len(reference)}")
        step = max(1, _WORKING // reference.shape[1])
        for start in range(0, len(reference), step):
            part = slice(start, start + step)
            self._add_chunk(reference[part], candidate[part], tokens[part])

    def _add_chunk(self, reference: Floats, candidate: Floats, tokens: NDArray[np.integer]) -> None:
        p, q = log_softmax(reference), log_softmax(candidate)
        divergence = kl_divergence(p, q)
        if not np.isfinite(divergence).all():
            worst = float(divergence[~np.isfinite(divergence)][0])
            raise AccuracyError("KL divergence", worst, np.inf, _OVERFLOWS)
        self._divergences.append(divergence)
        self._divergence.add(divergence)
        self._same.add((p.argmax(axis=1) == q.argmax(axis=1)).astype(np.float64))
        known = np.flatnonzero(tokens >= 0)
        self._surprise_reference.add(-p[known, tokens[known]])
        self._surprise.add(-q[known, tokens[known]])

    def result(self) -> Quality:
        """Return the quality so far.

        Raises:
            ValueError: No positions were added.
        """
        if not self._divergence.count:
            raise ValueError("no positions were compared")
        return Quality(
            self._divergence.count,
            Estimate(self._divergence.mean, self._divergence.error),
            _p99(np.concatenate(self._divergences)),
            Estimate(self._same.mean, self._same.error),
            _perplexity(self._surprise),
            _perplexity(self._surprise_reference),
        )


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """Return ln softmax of each row, [N, V] float64, with no overflow for any finite logits.

    >>> log_softmax(np.array([[1e30, 0.0]])).tolist()
    [[0.0, -1e+30]]
    """
    values = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # NaN stays NaN: the meter refuses it
        values -= values.max(axis=1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
    return values


def kl_divergence(reference: Floats, candidate: Floats) -> NDArray[np.float64]:
    """Return KL(reference || candidate) of each row in nats, from log-probabilities [N, V].

    A token that both rule out (-infinity) contributes 0. A -1e-17 from rounding, for equal rows, is
    returned as 0.

    >>> p = np.log(np.array([[0.5, 0.5]]))
    >>> kl_divergence(p, np.log(np.array([[0.25, 0.75]]))).round(6).tolist()
    [0.143841]
    """
    weights = np.exp(reference)
    with np.errstate(invalid="ignore"):  # infinity - infinity, where the weight is 0
        ratios = np.where(weights == 0, 0, reference - candidate)
    divergence: NDArray[np.float64] = np.einsum("nv,nv->n", weights, ratios)
    return np.maximum(divergence, 0.0)


def _p99(values: NDArray[np.float64]) -> Estimate | None:
    """Return the 99th percentile, with an error from order statistics one deviation away."""
    count = len(values)
    if count < P99_SAMPLES:
        return None
    spread = np.sqrt(0.99 * 0.01 / count)
    low, middle, high = np.quantile(values, [0.99 - spread, 0.99, min(1.0, 0.99 + spread)])
    return Estimate(float(middle), float(high - low) / 2)


def _perplexity(surprise: _Moments) -> Estimate | None:
    """Return exp of the mean, None on overflow, with an error by the delta method."""
    if not surprise.count:
        return None
    with np.errstate(over="ignore"):
        value = float(np.exp(surprise.mean))
    if not np.isfinite(value):
        return None
    return Estimate(value, None if surprise.error is None else value * surprise.error)
