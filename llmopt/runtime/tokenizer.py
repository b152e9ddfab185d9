"""The artifact's tokenizer, and rows of tokens padded to one array."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from llmopt.errors import ArtifactError, UsageError
from llmopt.interface.arrays import Array

TOKENIZER: Final = "tokenizer.json"


class Tokenizer:
    """The artifact's own tokenizer.

    Args:
        folder: The artifact.

    Raises:
        UsageError: It has none, so it takes tokens and not text.
        ArtifactError: The file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer as Backend

        path = folder / TOKENIZER
        if not path.is_file():
            raise UsageError(f"{folder}: has no {TOKENIZER}, so it takes token ids and not text")
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            self._backend: Any = Backend.from_str(text)
        except Exception as error:  # all that tokenizers raises for a bad file
            raise ArtifactError(path, f"not a tokenizer ({error})") from error
        # Files of sentence encoders carry a fixed length of their own.
        self._backend.no_padding()
        self._backend.no_truncation()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of ``text``; ``special`` adds those the model expects around it."""
        return list(self._backend.encode(text, add_special_tokens=special).ids)

    def encode_all(self, texts: Sequence[str], limit: int = 0) -> tuple[list[list[int]], int]:
        """Return the tokens of each text, cut to ``limit``, and how many had to be cut."""
        if limit:
            self._backend.enable_truncation(limit)
        try:
            encoded = self._backend.encode_batch_fast(list(texts))
        finally:
            self._backend.no_truncation()
        return [list(e.ids) for e in encoded], sum(bool(e.overflowing) for e in encoded)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of ``tokens``, special ones left out."""
        return str(self._backend.decode(tokens, skip_special_tokens=True))


def pad(
    rows: Sequence[Sequence[int]], fill: int, side: Literal["left", "right"]
) -> tuple[Array, Array]:
    """Return rows of tokens as one array, and its mask.

    >>> pad([[5], [6, 7]], 0, "left")[0].tolist()
    [[0, 5], [6, 7]]
    """
    longest = max(map(len, rows), default=0)
    tokens = np.full((len(rows), longest), fill, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(len(row))
        tokens[i, where] = row
        mask[i, where] = 1
    return tokens, mask
