"""Generating: what can be asked for, and the loop from tokens to tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from llmopt.errors import UsageError
from llmopt.interface.arrays import Array
from llmopt.interface.stepping import Sequences
from llmopt.runtime.detokenizer import Detokenizer, StopText
from llmopt.runtime.sampling import Sampler, Sampling
from llmopt.runtime.session import Session
from llmopt.runtime.tokenizer import pad

_BLOCK = 64
"""Capacities are rounded up to this, so that prompts of like lengths share a shape."""


class TokenOptions(TypedDict, total=False):
    """Keyword arguments of ``generate_ids``; the fields of `Request`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop_tokens: Sequence[int] | None
    beams: int
    length_penalty: float
    early_stopping: bool | str


class TextOptions(TypedDict, total=False):
    """Keyword arguments of ``generate`` and ``stream``; see `Request`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: str | Sequence[str]
    chat: bool
    beams: int
    length_penalty: float
    early_stopping: bool | str


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate.

    Args:
        max_new_tokens: Most tokens to add to a prompt.
        temperature: 0 takes the likeliest token; more is more random.
        top_p: Draw from the fewest likeliest tokens whose probabilities come to this much.
        top_k: Draw from this many of the likeliest tokens; 0 from all.
        seed: The same seed gives the same tokens.
        stop: Strings that end the text, and are not part of it.
        stop_tokens: Tokens that end a row; None for those of the manifest.
        chat: The prompt is what the user says to an assistant.
        beams: Sequences that a model which reads one text and writes another follows at once, see
            `llmopt.runtime.beam_search`; None for what the checkpoint says, as for the next two.
        length_penalty: Their scores are divided by their length to this power.
        early_stopping: End of the search: true, false or ``"never"``.

    Raises:
        UsageError: A value is outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_tokens: Sequence[int] | None = None
    chat: bool = False
    beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens {self.max_new_tokens} is below 1")
        _ = self.sampling

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.seed)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class Generation:
    """Rows of tokens being generated from prompts; iterate to make it go on.

    Each item is one step: the new token of every row, and None for rows that have ended. The
    token that ends a row is given too.

    Args:
        session: The model.
        prompts: Tokens, one list a row.
        request: Options of the request.
        steady: Inputs that are the same in every step.

    Raises:
        UsageError: A prompt is empty, too long, or holds a token the model does not have.
    """

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        request: Request,
        steady: Mapping[str, Array] | None = None,
    ) -> None:
        self._facts = facts = session.manifest.model
        self.prompts = prompts
        check_prompts(session, prompts)
        self._sampler = Sampler(request.sampling, len(prompts))
        stop = facts.eos if request.stop_tokens is None else request.stop_tokens
        self._stop_tokens = frozenset(map(int, stop))
        longest = max(map(len, prompts))
        self.limit = request.max_new_tokens
        if facts.max_length:
            self.limit = min(self.limit, facts.max_length - longest)
        room = capacity_for(longest + self.limit, facts.max_length)
        self._sequences = Sequences(session, len(prompts), room, steady)
        self._running = [True] * len(prompts)

    def end(self, row: int) -> None:
        """Let ``row`` end here."""
        self._running[row] = False

    def __iter__(self) -> Iterator[list[int | None]]:
        """Yield the tokens of each step."""
        fill = padding_token(self._facts.pad, self._facts.eos)
        tokens, mask = pad(self.prompts, fill, "left")
        logits = self._sequences.extend(tokens, mask)
        for made in range(1, self.limit + 1):
            # Plain lists from here: for a few rows they take a tenth of numpy's time.
            chosen = self._sampler.choose(logits[:, -1]).tolist()
            yield [token if on else None for token, on in zip(chosen, self._running, strict=True)]
            for row, token in enumerate(chosen):
                if token in self._stop_tokens:
                    self._running[row] = False
            if made == self.limit or not any(self._running):
                return
            fed = [t if on else fill for t, on in zip(chosen, self._running, strict=True)]
            logits = self._sequences.extend(np.array(fed, np.int64)[:, None])


class TextRow:
    """The text of one row, from its tokens.

    Args:
        decode: The tokenizer's decoding of a list of tokens.
        context: The tokens in front of the first one.
        stops: Strings that end it.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], context: Sequence[int], stops: Sequence[str]
    ) -> None:
        self._detokenizer = Detokenizer(decode, context)
        self._stop = StopText(stops)

    @property
    def ended(self) -> bool:
        """Whether a stop string came."""
        return self._stop.found

    def push(self, token: int) -> str:
        """Return the text that is ready now that ``token`` came."""
        return self._stop.push(self._detokenizer.push(token))

    def finish(self) -> str:
        """Return the rest."""
        return self._stop.push(self._detokenizer.finish()) + self._stop.finish()


def check_prompts(session: Session, prompts: Sequence[Sequence[int]]) -> None:
    """Raise unless the model can continue every prompt.

    Raises:
        UsageError: One is empty, too long, or holds a token the model does not have.
    """
    facts = session.manifest.model
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise UsageError("the prompt is empty: give at least one token")
    if facts.max_length and max(lengths) >= facts.max_length:
        raise UsageError(
            f"the prompt has {max(lengths)} tokens and the model takes {facts.max_length}, "
            "new ones included; shorten the prompt"
        )
    for prompt in prompts:
        check_tokens(np.asarray(prompt), facts.vocabulary)


def check_tokens(tokens: Array, vocabulary: int) -> None:
    """Raise unless every token is a row of the model's embedding.

    Raises:
        UsageError: One is not.
    """
    low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
    if low < 0 or (vocabulary and high >= vocabulary):
        wrong = low if low < 0 else high
        raise UsageError(f"token {wrong} is not one of the model's {vocabulary or ''} tokens")


def capacity_for(tokens: int, max_length: int) -> int:
    """Return how many tokens to make room for.

    >>> capacity_for(65, 2048), capacity_for(65, 100)
    (128, 100)
    """
    rounded = -(-tokens // _BLOCK) * _BLOCK
    return min(rounded, max_length) if max_length else rounded


def padding_token(pad_token: int | None, eos: Sequence[int]) -> int:
    """Return the token that fills up rows; nothing attends to it, so any valid one will do."""
    if pad_token is not None and pad_token >= 0:
        return pad_token
    return eos[0] if eos else 0
