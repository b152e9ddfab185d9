"""Using an artifact: text, tokens, embeddings and raw tensors."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack, overload

import numpy as np
from typing_extensions import override

from llmopt.artifact.manifest import Manifest
from llmopt.errors import UnknownNameError, UsageError
from llmopt.interface.arrays import Array
from llmopt.interface.signature import Role
from llmopt.interface.stepping import Sequences, forced, one_by_one
from llmopt.runtime.embedding import check_embeds, embed_rows
from llmopt.runtime.encoder_decoder import ENCODER, Seq2Seq, Seq2SeqOptions
from llmopt.runtime.feeds import complete_feeds
from llmopt.runtime.generation import (
    Generation,
    Request,
    TextOptions,
    TextRow,
    TokenOptions,
    check_tokens,
)
from llmopt.runtime.prompts import Conversation, Prompt, is_one, render_chat
from llmopt.runtime.session import open_session
from llmopt.runtime.tokenizer import Tokenizer
from llmopt.runtime.vision import image_features_of, insert_image_tokens, with_vision

logger = logging.getLogger("llmopt")


class Runner:
    """An artifact, opened on this machine.

    Args:
        folder: The artifact.
        threads: Threads inside one operator; None for as many as the process may use.

    Raises:
        ArtifactError: The artifact is damaged, incomplete or from a newer llmopt.
        BackendUnavailableError: What it needs is not installed here.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise UsageError(f"threads {threads} is below 1")
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self.manifest.check_sizes(folder)
        self.session = with_vision(folder, open_session(folder, self.manifest, threads))
        self.rewriter = Seq2Seq.open(folder, self.manifest, self.session)
        self._warned = False

    @override
    def __repr__(self) -> str:
        name, task, target = self.folder.name, self.manifest.task, self.manifest.target
        return f"<Runner {name!r}: {task!r} on {target}, {self.session.threads} threads>"

    @overload
    def generate(
        self, prompt: str | Conversation, *, images: Any = None, **options: Unpack[TextOptions]
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: list[str] | list[Conversation],
        *,
        images: Any = None,
        **options: Unpack[TextOptions],
    ) -> list[str]: ...
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        images: Any = None,
        **options: Unpack[TextOptions],
    ) -> str | list[str]:
        """Return the text that follows the prompt, without the prompt; or what it becomes.

        Args:
            prompt: A text, or several to be continued (by a model that reads one text and writes
                another: rewritten) together. With ``chat=True`` each may be
                a conversation: ``{"role": …, "content": …}`` for each message.
            images: Pixels for a vision-language model: [I, channels, height, width] float, as the
                checkpoint's image processor makes them, in the order of their tokens in the
                prompts.
            **options: See `Request`.

        Returns:
            One text, or one for each prompt.

        Raises:
            UsageError: An option is out of range, or a prompt empty or too long.
        """
        one = is_one(prompt)
        prompts: Any = [prompt] if one else prompt
        if self.rewriter is not None:
            texts = [_text(each) for each in prompts]
            found = self.rewriter.texts(texts, self.tokenizer, self._asked(images, options))
            return found[0] if one else found
        texts = [""] * len(prompts)
        for row, piece in self._pieces(prompts, _request(options), images):
            texts[row] += piece
        return texts[0] if one else texts

    def stream(
        self, prompt: Prompt, *, images: Any = None, **options: Unpack[TextOptions]
    ) -> Iterator[str]:
        """Yield the text that follows the prompt, piece by piece as it is made.

        Args:
            prompt: A text; with ``chat=True`` perhaps a conversation.
            images: See `generate`.
            **options: See `Request`.

        Yields:
            Pieces of whole characters; together they are what `generate` returns.

        Raises:
            UsageError: An option is out of range, or the prompt is empty or too long.
        """
        if self.rewriter is not None:
            asked = self._asked(images, options)
            yield from self.rewriter.texts([_text(prompt)], self.tokenizer, asked)
            return
        for _, piece in self._pieces([prompt], _request(options), images):
            if piece:
                yield piece

    def generate_ids(
        self,
        ids: Sequence[int] | Sequence[Sequence[int]] | Array,
        *,
        images: Any = None,
        **options: Unpack[TokenOptions],
    ) -> list[Any]:
        """Return the tokens that follow, the one that ended each row included.

        Args:
            ids: Tokens of one prompt, or of several.
            images: See `generate`.
            **options: See `Request`.

        Returns:
            A list of tokens, or one list for each prompt.

        Raises:
            UsageError: An option is out of range, or a prompt empty or too long.
        """
        one = len(ids) == 0 or not isinstance(ids[0], Sequence | np.ndarray)
        prompts: list[Any] = [ids] if one else list(ids)
        if self.rewriter is not None:
            written = self.rewriter.ids(prompts, self._asked(images, options))
            return written[0] if one else written
        rows: list[list[int]] = [[] for _ in prompts]
        for first, generation in self._generations(prompts, _request(options), images):
            for tokens in generation:
                for row, token in enumerate(tokens):
                    if token is not None:
                        rows[first + row].append(token)
        return rows[0] if one else rows

    def transcribe(
        self,
        features: Any,
        *,
        language: str | None = None,
        task: str | None = None,
        **options: Unpack[TokenOptions],
    ) -> list[str]:
        """Return the text of each recording.

        Args:
            features: [B, bands, frames] or [bands, frames] float32: log-mel features of 30 s, as
                the checkpoint's feature extractor makes them.
            language: Spoken language, ``"en"``; detected by default.
            task: ``"transcribe"``, or ``"translate"`` into English.
            **options: See `Request`.

        Returns:
            One text for each recording.

        Raises:
            UsageError: The model hears nothing, or an option is out of range.
        """
        if self.rewriter is None:
            raise UsageError(
                f"transcribe() needs a speech-to-text artifact, not one for {self.manifest.task!r}"
            )
        spoken = language, task
        asked = self._asked(None, options)
        return self.rewriter.transcribe(features, self.tokenizer, asked, spoken)

    def logits(
        self,
        ids: Any,
        prefill: int | None = None,
        *,
        mask: Any = None,
        source: Mapping[str, Array] | None = None,
        images: Any = None,
    ) -> Array:
        """Return the logits of every position, computed as generation would.

        Args:
            ids: [B, S] tokens.
            prefill: Number of tokens in the first step; the rest follow one by one. None for all.
            mask: [B, S], 0 where a row is padding in front; None where there is none.
            source: Inputs of the encoder by name, for an encoder-decoder model.
            images: See `generate`; their tokens are all in the first step.

        Returns:
            [B, S, V] float32.

        Raises:
            UsageError: The tokens are not the model's, or too many.
        """
        tokens = np.asarray(ids, np.int64)
        self._check_ids(tokens, prefill)
        batch, length = tokens.shape
        real = np.ones_like(tokens) if mask is None else np.asarray(mask, np.int64)
        memory, first = self._memory(source), prefill or length
        if images is not None:
            memory |= image_features_of(self.session, tokens[:, :first], images)
        sequences = Sequences(self.session, batch, length, memory)
        logits = forced(sequences, tokens, real, one_by_one(first, length))
        if logits.shape[1] != length:
            raise UsageError("the model returns logits of the last token only; pass prefill=1")
        return logits.astype(np.float32, copy=False)

    def embed(self, texts: Sequence[str], batch_size: int = 32) -> Array:
        """Return one embedding a text.

        Texts longer than the model takes are cut, with a warning that says how many.

        Args:
            texts: Sentences.
            batch_size: Number of texts in one batch.

        Returns:
            [N, E] float32, in the order of ``texts``.

        Raises:
            UsageError: The artifact makes no embeddings.
        """
        if isinstance(texts, str):
            raise UsageError("embed takes a list of texts; put the text in a list")
        check_embeds(self.session)
        limit = self.manifest.model.max_length
        rows, cut = self.tokenizer.encode_all(texts, limit)
        if cut:
            logger.warning("%d of %d texts were cut to %d tokens", cut, len(texts), limit)
        return embed_rows(self.session, rows, batch_size)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        """Return every output of the model, by name.

        Args:
            feeds: Arrays by input name; see `complete_feeds` for what may be left out. Of a model
                with an encoder, that one's begin with ``encoder.``.

        Raises:
            UsageError: A name, element type or shape is not what the model takes.
        """
        start = f"{ENCODER}."
        source = {n.removeprefix(start): a for n, a in feeds.items() if n.startswith(start)}
        if self.rewriter is None or not source:
            return self.session.run(complete_feeds(self.session, feeds))
        reader = self.rewriter.reader
        memory = reader.read(complete_feeds(reader.encoder, source))
        rest = {name: array for name, array in feeds.items() if not name.startswith(start)}
        return self.session.run(complete_feeds(self.session, {**rest, **memory}))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer."""
        return Tokenizer(self.folder)

    def _pieces(
        self, prompts: Sequence[Prompt], request: Request, images: Any
    ) -> Iterator[tuple[int, str]]:
        """Yield (row, text) for each piece of text of each row."""
        ids = [self._encode(prompt, chat=request.chat) for prompt in prompts]
        stop_tokens = frozenset(self.manifest.model.eos)
        for first, generation in self._generations(ids, request, images):
            rows = [
                TextRow(self.tokenizer.decode, () if request.chat else prompt, request.stops)
                for prompt in generation.prompts
            ]
            for tokens in generation:
                for row, token in enumerate(tokens):
                    if token is None or token in stop_tokens:
                        continue
                    yield first + row, rows[row].push(token)
                    if rows[row].ended:
                        generation.end(row)
            yield from ((first + i, row.finish()) for i, row in enumerate(rows))

    def _generations(
        self, prompts: Sequence[Sequence[int]], request: Request, images: Any
    ) -> Iterator[tuple[int, Generation]]:
        """Yield (number of its first row, generation): one for all prompts where they can share.

        Without a mask the model cannot tell padding from text, so prompts go one by one.
        """
        for name in ("beams", "length_penalty", "early_stopping"):
            if getattr(request, name) is not None:
                problem = "it is for models that read one text and write another; leave it out"
                raise UsageError(f"{name}: {problem}")
        self._warn_without_cache()
        prompts, given = insert_image_tokens(self.session, prompts, images)
        together = self.session.find(Role.MASK) is not None or len(set(map(len, prompts))) == 1
        if together or not prompts:
            if prompts:
                yield 0, Generation(self.session, prompts, request, given)
            return
        for row, prompt in enumerate(prompts):
            yield row, Generation(self.session, [prompt], request, given)

    def _encode(self, prompt: Prompt, *, chat: bool) -> list[int]:
        if chat:
            return self.tokenizer.encode(render_chat(self.folder, prompt), special=False)
        if not isinstance(prompt, str):
            raise UsageError("a conversation needs chat=True")
        bos = self.manifest.model.bos
        return self.tokenizer.encode(prompt) or ([] if bos is None else [bos])

    def _check_ids(self, tokens: Array, prefill: int | None) -> None:
        facts = self.manifest.model
        if tokens.ndim != 2 or tokens.size == 0:
            raise UsageError(f"tokens should be [B, S] and not empty, not {list(tokens.shape)}")
        length = tokens.shape[1]
        if facts.max_length and length > facts.max_length:
            raise UsageError(f"{length} tokens are more than the model's {facts.max_length}")
        if prefill is not None and not 1 <= prefill <= length:
            raise UsageError(f"prefill {prefill} is not between 1 and {length}")
        check_tokens(tokens, facts.vocabulary)

    def _memory(self, source: Mapping[str, Array] | None) -> dict[str, Array]:
        if (self.rewriter is None) != (source is None):
            had = (
                "an encoder: give what it reads"
                if source is None
                else "no encoder: it reads nothing"
            )
            raise UsageError(f"the model has {had} as source")
        if self.rewriter is None or source is None:
            return {}
        return self.rewriter.reader.read(source)

    def _asked(self, images: Any, options: Mapping[str, Any]) -> Seq2SeqOptions:
        """Return what is asked of a model that reads, which sees no images."""
        insert_image_tokens(self.session, (), images)
        return Seq2SeqOptions(_request(options), frozenset(options))

    def _warn_without_cache(self) -> None:
        if self.manifest.model.cache == "none" and not self._warned:
            self._warned = True
            logger.warning("no KV cache: each new token recomputes the whole prefix")


def _text(prompt: Prompt) -> str:
    if not isinstance(prompt, str):
        raise UsageError("an encoder-decoder model takes text, not a conversation")
    return prompt


def _request(options: Mapping[str, Any]) -> Request:
    known = [field.name for field in dataclasses.fields(Request)]
    for name in options:
        if name not in known:
            raise UnknownNameError("option", name, known)
    return Request(**options)
