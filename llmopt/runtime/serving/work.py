"""What the thread of the model does for a request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from llmopt.errors import UsageError
from llmopt.interface.arrays import Array
from llmopt.runtime.embedding import check_embeds, embed_rows
from llmopt.runtime.generation import (
    Generation,
    Request,
    TextRow,
    check_prompts,
    check_tokens,
)
from llmopt.runtime.prompts import render_chat
from llmopt.runtime.runner import Runner
from llmopt.runtime.serving.refusals import RefusedError
from llmopt.runtime.serving.requests import Ask, EmbedAsk, Tokens

Rows = tuple[Tokens, ...]
BATCH: Final = 16
"""Texts embedded at once: others come to their turn in between, and a client may leave."""


@dataclass(frozen=True)
class Text:
    """A piece of a generated text.

    Args:
        row: Number of the prompt that it continues.
        text: New text; may be empty.
        tokens: Number of tokens of that row so far.
        reason: Reason of the end, ``"stop"`` or ``"length"``; None if it goes on.
    """

    row: int
    text: str
    tokens: int
    reason: str | None = None


def prompts_of(runner: Runner, ask: Ask) -> Rows:
    """Return the tokens of each prompt.

    Raises:
        RefusedError: The model cannot continue one.
    """
    if runner.manifest.task != "generate":
        raise RefusedError(400, f"this model is made to {runner.manifest.task}, not to generate")
    bos = runner.manifest.model.bos
    rows = []
    for prompt in ask.prompts:
        if isinstance(prompt, list):
            text = render_chat(runner.folder, prompt)
            rows.append(_tokens(runner, text, special=False))
        elif isinstance(prompt, str):
            rows.append(_tokens(runner, prompt) or (() if bos is None else (bos,)))
        else:
            rows.append(prompt)
    check_prompts(runner.session, rows)
    return tuple(rows)


def inputs_of(runner: Runner, ask: EmbedAsk) -> Rows:
    """Return the tokens of each input.

    Raises:
        RefusedError: The model makes no embeddings, not as wide ones, or not of one of these.
    """
    check_embeds(runner.session)
    facts = runner.manifest.model
    if ask.width not in {None, facts.hidden}:
        problem = f"the embeddings have {facts.hidden} numbers, not {ask.width}"
        raise RefusedError(400, problem, "dimensions")
    rows = [_tokens(runner, each) if isinstance(each, str) else each for each in ask.inputs]
    longest = max(map(len, rows))
    if facts.max_length and longest > facts.max_length:
        problem = f"an input has {longest} tokens and the model takes {facts.max_length}"
        raise RefusedError(400, problem, "input", "context_length_exceeded")
    for row in rows:
        check_tokens(np.asarray(row), facts.vocabulary)
    return tuple(rows)


def generate(runner: Runner, rows: Rows, options: Request) -> Iterator[Text]:
    """Yield the text after each prompt, one row after the other, once for every token."""
    for row, prompt in enumerate(rows):
        yield from _generate(runner, row, prompt, options)


def embed(runner: Runner, rows: Rows) -> Iterator[Array]:
    """Yield embeddings [n, E] of a few inputs at a time, in their order."""
    for start in range(0, len(rows), BATCH):
        yield embed_rows(runner.session, rows[start : start + BATCH], BATCH)


def _generate(runner: Runner, row: int, prompt: Tokens, options: Request) -> Iterator[Text]:
    generation = Generation(runner.session, [prompt], options)
    context: Sequence[int] = () if options.chat else prompt
    text = TextRow(runner.tokenizer.decode, context, options.stops)
    count, reason = 0, "length"
    for [token] in generation:
        count += 1
        if token is None or token in runner.manifest.model.eos:
            reason = "stop"
            break
        yield Text(row, text.push(token), count)
        if text.ended:
            reason = "stop"
            break
    yield Text(row, text.finish(), count, reason)


def _tokens(runner: Runner, text: str, *, special: bool = True) -> Tokens:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell what Unicode has not
        raise UsageError(
            "the text holds half of a surrogate pair, which is no character"
        ) from error
    return tuple(runner.tokenizer.encode(text, special=special))
