"""Beam search: several sequences are followed at once, and the best that ended is taken.

Scores are sums of log probabilities. A sequence that ends is ranked by its score over its length
(in tokens written) to the power of ``length_penalty``: above 0 long ones are favoured, below 0
short ones. Of each source as many ended sequences are kept as there are beams. A search is over
when no sequence can be lengthened, and, by ``early_stopping``:

``True``
    as soon as as many have ended as there are beams;
``False``
    when they have, and the best that has not ended, taken as if it ended here, is worse than all;
``"never"``
    when they have, and the best that has not ended is worse than all even at the length that
    favours it.

These are the rules of transformers, so that the same model writes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from llmopt.errors import UsageError
from llmopt.interface.arrays import Array

_NOTHING: Final = np.float32(-1e9)  # the score of what cannot be gone on with


@dataclass(frozen=True, kw_only=True)
class Search:
    """How to search.

    Args:
        beams: Sequences followed at once.
        length_penalty: Scores are divided by the length to this power.
        early_stopping: End of a search: ``True``, ``False`` or ``"never"``.
        eos: Tokens that end a sequence.
        begun: Number of tokens that a sequence begins with.
        limit: Most tokens of a sequence, those included.

    Raises:
        UsageError: A value is outside its range.
    """

    beams: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    eos: frozenset[int] = frozenset()
    begun: int = 1
    limit: int = 128

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.beams < 1:
            raise UsageError(f"beams {self.beams} is below 1")
        if self.early_stopping not in (True, False, "never"):
            raise UsageError(f"early_stopping {self.early_stopping!r} is not true, false or never")

    @property
    def candidates(self) -> int:
        """How many continuations are looked at: so many that enough have not ended."""
        return max(2, 1 + len(self.eos)) * self.beams

    def ranked(self, score: np.float32, length: int) -> np.float32:
        """Return the score that an ended sequence of ``length`` tokens is ranked by."""
        return np.float32(score / np.float32((length - self.begun) ** self.length_penalty))


@dataclass
class Beams:
    """The search for what one source becomes.

    Args:
        search: Options of the search.
        start: Tokens that every sequence begins with.
    """

    search: Search
    start: Sequence[int]
    running: list[list[int]] = field(init=False)
    scores: Array = field(init=False)
    ended: list[tuple[np.float32, list[int]]] = field(init=False, default_factory=list)
    improvable: bool = field(init=False, default=True)
    stuck: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        """Begin with equal beams, of which the first alone counts."""
        self.running = [list(self.start) for _ in range(self.search.beams)]
        self.scores = np.full(self.search.beams, _NOTHING, np.float32)
        self.scores[0] = 0

    @property
    def full(self) -> bool:
        """Whether as many sequences have ended as there are beams."""
        return len(self.ended) == self.search.beams

    @property
    def over(self) -> bool:
        """Whether nothing that is still to come can change the result."""
        return (
            self.stuck or not self.improvable or (self.full and self.search.early_stopping is True)
        )

    @property
    def best(self) -> list[int]:
        """The best sequence that ended, or else the best of all."""
        return self.ended[0][1] if self.ended else self.running[0]

    def advance(self, logs: Array) -> list[int]:
        """Take the next token of every beam; return which beam each of them goes on from.

        Args:
            logs: [beams, V] float32, log probabilities after what each beam holds.
        """
        tokens, places, scores = self._likeliest(logs)
        length = len(self.running[0]) + 1
        made = [[*self.running[i], t] for i, t in zip(places, tokens, strict=True)]
        at_end = [t in self.search.eos or length >= self.search.limit for t in tokens]
        if not self.over:
            self._keep(made, scores, at_end)
        order = sorted(range(len(made)), key=lambda i: at_end[i])[: self.search.beams]
        self.running = [made[i] for i in order]
        self.scores = np.array(
            [scores[i] + _NOTHING if at_end[i] else scores[i] for i in order], np.float32
        )
        self.stuck = all(at_end)
        self.improvable = self.improvable and self._can_improve(length)
        return [places[i] for i in order]

    def _likeliest(self, logs: Array) -> tuple[list[int], list[int], list[np.float32]]:
        """Return token, beam and score of each candidate, the likeliest first."""
        sums = (logs + self.scores[:, None]).reshape(-1)
        count = min(self.search.candidates, sums.size)
        chosen = np.argpartition(-sums, count - 1)[:count]
        chosen = chosen[np.lexsort((chosen, -sums[chosen]))]
        width = logs.shape[1]
        return (chosen % width).tolist(), (chosen // width).tolist(), list(sums[chosen])

    def _keep(
        self, sequences: list[list[int]], scores: list[np.float32], at_end: list[bool]
    ) -> None:
        """Keep the best of those that ended, of the first candidates alone."""
        beams = self.search.beams
        new = [
            (self.search.ranked(scores[i], len(sequences[i])), sequences[i])
            for i in range(min(beams, len(sequences)))
            if at_end[i]
        ]
        both = [*self.ended, *(each for each in new if each[0] > _NOTHING)]
        self.ended = sorted(both, key=lambda each: -each[0])[:beams]

    def _can_improve(self, length: int) -> bool:
        search = self.search
        favoured = search.early_stopping == "never" and search.length_penalty > 0
        best = search.ranked(self.scores[0], search.limit if favoured else length)
        worst = self.ended[-1][0] if self.full else _NOTHING
        return bool(best > worst)


def log_softmax(logits: Array) -> Array:
    """Return log probabilities [R, V] float32."""
    shifted = logits.astype(np.float32) - logits.max(axis=-1, keepdims=True)
    logs: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs
