"""Choosing the next token: greedily, or at random from a cut-off distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llmopt.errors import LlmoptError, UsageError
from llmopt.interface.arrays import Array


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Keep the fewest likeliest tokens whose probabilities come to this much.
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
        seed: The same seed gives the same tokens; None draws a new one.

    Raises:
        UsageError: A value is outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.temperature < np.inf:
            raise UsageError(f"temperature {self.temperature} is not a number from 0 up")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p} is not above 0 and at most 1")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k} is below 0; 0 keeps all tokens")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"seed {self.seed} is below 0")


@dataclass
class Sampler:
    """Draws the tokens of a batch; each row has its own generator.

    A row's tokens depend on the seed and on its place in the batch, not on the other rows.

    Args:
        sampling: Sampling options.
        rows: B.
    """

    sampling: Sampling
    rows: int
    _generators: Sequence[np.random.Generator] = field(init=False)

    def __post_init__(self) -> None:
        """Seed a generator for each row."""
        seed = self.sampling.seed
        if seed is None:
            self._generators = np.random.default_rng().spawn(self.rows)
        else:
            self._generators = [np.random.default_rng([seed, row]) for row in range(self.rows)]

    def choose(self, logits: Array) -> Array:
        """Return one token a row.

        Args:
            logits: [B, V], finite but for masked tokens at -inf.

        Returns:
            [B] int64.

        Raises:
            LlmoptError: A row holds NaN, or nothing finite.
        """
        best: Array = logits.argmax(axis=-1).astype(np.int64)  # numpy puts NaN first
        if not all(math.isfinite(row[token]) for row, token in zip(logits, best, strict=True)):
            raise LlmoptError(
                "the model returned logits that are not finite; "
                "verify the artifact with `llmopt evaluate`"
            )
        if self.sampling.temperature == 0:
            return best
        pairs = zip(logits, self._generators, strict=True)
        return np.array([draw(row, self.sampling, random) for row, random in pairs], np.int64)


def draw(logits: Array, sampling: Sampling, random: np.random.Generator) -> int:
    """Return a token drawn from ``logits`` [V]."""
    tokens, chances = shortlist(logits, sampling)
    cumulative = chances.cumsum()
    # A uniform number below the last value never lands on a token of probability 0 behind it.
    place = np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")
    return int(tokens[place])


def shortlist(logits: Array, sampling: Sampling) -> tuple[Array, Array]:
    """Return the tokens that may be drawn, ascending, and their probabilities.

    Temperature comes first, then top-k, then top-p. Tokens as likely as the k-th are all kept, as
    transformers does it.

    >>> import numpy as np
    >>> tokens, chances = shortlist(np.log([0.5, 0.2, 0.3]), Sampling(temperature=1, top_k=2))
    >>> tokens.tolist(), chances.round(3).tolist()
    ([0, 2], [0.625, 0.375])
    """
    tokens = np.arange(logits.size)
    if 0 < sampling.top_k < logits.size:
        tokens = np.flatnonzero(logits >= np.partition(logits, -sampling.top_k)[-sampling.top_k])
    chances = softmax(logits[tokens].astype(np.float64) / sampling.temperature)
    if sampling.top_p < 1:
        kept = _nucleus(chances, sampling.top_p)
        tokens, chances = tokens[kept], chances[kept] / chances[kept].sum()
    return tokens, chances


def softmax(scores: Array) -> Array:
    """Return exp(scores) scaled to a sum of 1; -inf becomes 0."""
    powers = np.exp(scores - scores.max())
    total: Array = powers / powers.sum()
    return total


def _nucleus(chances: Array, top_p: float) -> Array:
    """Return the places of the fewest likeliest values that come to ``top_p``, ascending."""
    # Values below this come to less than 1 - top_p together: they need no sorting.
    worth = np.flatnonzero(chances >= (1 - top_p) / chances.size)
    order = worth[np.argsort(-chances[worth], kind="stable")]
    before = np.concatenate([[0.0], chances[order].cumsum()[:-1]])
    kept: Array = np.sort(order[before < top_p])
    return kept
