"""What a checkpoint's ``generation_config.json`` forbids or forces, token by token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from llmopt.artifact.fields import Fields
from llmopt.errors import ArtifactError
from llmopt.interface.arrays import Array

FILE: Final = "generation_config.json"
UNHEEDED: Final = (
    "do_sample",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "diversity_penalty",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "renormalize_logits",
    "sequence_bias",
)
"""Settings that change what transformers writes, and that are not heeded here."""
_NEUTRAL: Final = (None, False, 0, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Defaults of generation with an encoder-decoder model.

    Lengths count every token of the written sequence, those that it begins with included.

    Args:
        start: First token; None for the manifest's.
        eos: Tokens that end it.
        max_length: Most tokens; 0 for no limit.
        min_length: Number of tokens before which no ``eos`` comes.
        min_new_tokens: Number of tokens after the beginning before which no ``eos`` comes.
        forced_bos: The token after the first one.
        forced_eos: The token that a sequence of most tokens ends with.
        no_repeat: Length of runs of tokens that must not repeat; 0 for none.
        bad_words: Tokens in a row that never come.
        suppressed: Tokens that never come.
        first_suppressed: Tokens that do not come first after the beginning.
        beams: Sequences that are followed at once.
        length_penalty: Scores are divided by the length to this power.
        early_stopping: End of a search, see `beam_search`.
        languages: A token for each language that is heard, by name.
        tasks: A token for each task, by name.
        no_timestamps: The token that asks for none.
    """

    start: int | None = None
    eos: tuple[int, ...] = ()
    max_length: int = 0
    min_length: int = 0
    min_new_tokens: int = 0
    forced_bos: int | None = None
    forced_eos: tuple[int, ...] = ()
    no_repeat: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    suppressed: tuple[int, ...] = ()
    first_suppressed: tuple[int, ...] = ()
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    languages: Mapping[str, int] | None = None
    tasks: Mapping[str, int] | None = None
    no_timestamps: int | None = None

    @classmethod
    def read(cls, artifact: Path) -> Self:
        """Return the rules of the artifact at a path; none where it has no such file.

        Raises:
            ArtifactError: The file cannot be read.
        """
        path = artifact / FILE
        if not path.is_file():
            return cls()
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ArtifactError(path, f"cannot be read ({error})") from error
        found = Fields(given, path)
        data = Fields({key: value for key, value in given.items() if value is not None}, path)
        return cls(
            start=found.maybe_number("decoder_start_token_id"),
            eos=_tokens(data, given, "eos_token_id"),
            max_length=data.number("max_length", 0),
            min_length=data.number("min_length", 0),
            min_new_tokens=data.number("min_new_tokens", 0),
            forced_bos=found.maybe_number("forced_bos_token_id"),
            forced_eos=_tokens(data, given, "forced_eos_token_id"),
            no_repeat=data.number("no_repeat_ngram_size", 0),
            bad_words=_words(data, given),
            suppressed=data.numbers("suppress_tokens"),
            first_suppressed=data.numbers("begin_suppress_tokens"),
            beams=data.number("num_beams", 1),
            length_penalty=_real(data, given, "length_penalty", 1.0),
            early_stopping=_stopping(data, given),
            languages=_named(data, "lang_to_id"),
            tasks=_named(data, "task_to_id"),
            no_timestamps=found.maybe_number("no_timestamps_token_id"),
        )

    def apply(self, scores: Array, rows: Sequence[Sequence[int]], begun: int, limit: int) -> Array:
        """Return scores with what is forbidden at minus infinity; the array is changed.

        Args:
            scores: [R, V] float32, of the token after each row.
            rows: Tokens so far, one sequence of equal length for each row.
            begun: Number of tokens that each began with.
            limit: Most tokens.
        """
        length = len(rows[0])
        for row, written in enumerate(rows):
            scores[row, self._repeated(written)] = -np.inf
            scores[row, self._bad(written)] = -np.inf
        if self.eos and (length < self.min_length or length - begun < self.min_new_tokens):
            scores[:, list(self.eos)] = -np.inf
        if length == 1 and self.forced_bos is not None:
            _force(scores, [self.forced_bos])
        if self.forced_eos and length == limit - 1:
            _force(scores, self.forced_eos)
        scores[:, list(self.suppressed)] = -np.inf
        first = begun if begun > 1 or self.forced_bos is None else begun + 1
        if length == first:
            scores[:, list(self.first_suppressed)] = -np.inf
        return scores

    def _repeated(self, written: Sequence[int]) -> list[int]:
        """Return the tokens that would make a run of ``no_repeat`` tokens come again."""
        size = self.no_repeat
        if not size or len(written) + 1 < size:
            return []
        last = tuple(written[len(written) - size + 1 :])
        runs = (tuple(written[i : i + size]) for i in range(len(written) - size + 1))
        return [run[-1] for run in runs if run[:-1] == last]

    def _bad(self, written: Sequence[int]) -> list[int]:
        """Return the tokens that would end one of the bad words."""
        return [
            word[-1]
            for word in self.bad_words
            if len(word) <= len(written) + 1
            and tuple(written[len(written) - len(word) + 1 :]) == word[:-1]
        ]


def unheeded(settings: Mapping[str, Any]) -> list[str]:
    """Return the settings of a checkpoint that would change what is written, and are not heeded.

    >>> unheeded({"repetition_penalty": 1.3, "do_sample": False, "num_beams": 4})
    ['repetition_penalty']
    """
    return [name for name in UNHEEDED if settings.get(name) not in _NEUTRAL]


def _force(scores: Array, tokens: Sequence[int]) -> None:
    scores[...] = -np.inf
    scores[:, list(tokens)] = 0.0


def _tokens(data: Fields, settings: Mapping[str, Any], key: str) -> tuple[int, ...]:
    if settings.get(key) is None:
        return ()
    return data.numbers(key) if isinstance(settings[key], list) else (data.number(key),)


def _words(data: Fields, settings: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    words = settings.get("bad_words_ids") or []
    if not isinstance(words, list) or not all(isinstance(w, list) and w for w in words):
        raise data.bad("bad_words_ids", "lists of tokens")
    return tuple(tuple(map(int, word)) for word in words)


def _real(data: Fields, settings: Mapping[str, Any], key: str, default: float) -> float:
    value = default if settings.get(key) is None else settings[key]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise data.bad(key, "a number")
    return float(value)


def _stopping(data: Fields, settings: Mapping[str, Any]) -> bool | str:
    value = settings.get("early_stopping") or False
    if value not in (True, False, "never"):
        raise data.bad("early_stopping", "true, false or 'never'")
    return value if isinstance(value, bool) else "never"


def _named(data: Fields, key: str) -> Mapping[str, int] | None:
    found = data.mapping(key)
    return {str(name): int(token) for name, token in found.items()} or None
