"""Text out of tokens, piece by piece, and where to stop it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

_CONTEXT: Final = 6
_PARTIAL: Final = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns tokens into text as they come; the pieces join to the decoding of them all.

    A tokenizer may spread one character over several tokens, and may decode a token another way
    behind a neighbour (a first space is dropped, byte tokens merge). So a few tokens before the
    new ones are decoded again each time, and a character waits until it is whole.

    Args:
        decode: The tokenizer's decoding of a list of tokens.
        context: The tokens in front of the first one.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._tokens = list(context[-_CONTEXT:])
        self._start = 0
        self._told = len(self._tokens)

    def push(self, token: int) -> str:
        """Return the text that ``token`` completes, which may be none."""
        self._tokens.append(token)
        text = self._untold()
        if not text or text.endswith(_PARTIAL):
            return ""
        self._start, self._told = self._told, len(self._tokens)
        return text

    def finish(self) -> str:
        """Return what was still waiting."""
        text = self._untold()
        self._start = self._told = len(self._tokens)
        return text

    def _untold(self) -> str:
        told = self._decode(self._tokens[self._start : self._told])
        return self._decode(self._tokens[self._start :])[len(told) :]


class StopText:
    """Cuts text where one of the stop strings begins, holding back what may become one.

    Args:
        stops: The strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Return the text that is safe to show."""
        if self.found:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """Return what was held back, now that nothing follows it."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` begin ``stop``.

    >>> _overlap("one line. Us", " User:")
    3
    """
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
