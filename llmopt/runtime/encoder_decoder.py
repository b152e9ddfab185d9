"""From one text, or from sounds, to another text: with an artifact of two models."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from llmopt.artifact.manifest import Manifest
from llmopt.errors import LlmoptError, UsageError
from llmopt.interface.arrays import Array
from llmopt.interface.signature import Role
from llmopt.runtime.decoder_loop import DecoderLoop, EncoderRun
from llmopt.runtime.generation import Request, check_tokens, padding_token
from llmopt.runtime.logits_processors import Rules
from llmopt.runtime.session import Session, open_session
from llmopt.runtime.tokenizer import Tokenizer, pad

logger = logging.getLogger("llmopt")
ENCODER = "encoder"


@dataclass(frozen=True)
class Seq2SeqOptions:
    """Options of generation, and which of them were set.

    Args:
        request: Options of the request.
        explicit: Names of the options that were set.
    """

    request: Request
    explicit: frozenset[str]


@dataclass(frozen=True)
class Seq2Seq:
    """The two models of an artifact, opened on this machine.

    Args:
        manifest: Manifest of the artifact.
        reader: The model that reads, and what takes its outputs.
        rules: Defaults of generation.
    """

    manifest: Manifest
    reader: EncoderRun
    rules: Rules

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, decoder: Session) -> Self | None:
        """Return it for an artifact whose decoder is open; None if it has one model alone.

        Raises:
            ArtifactError: A file cannot be read.
            BackendUnavailableError: What it needs is not installed here.
        """
        alone = manifest.component(ENCODER)
        if alone is None:
            return None
        encoder = open_session(folder, alone, decoder.threads)
        return cls(manifest, EncoderRun(encoder, decoder), Rules.read(folder))

    def texts(
        self, texts: Sequence[str], tokenizer: Tokenizer, options: Seq2SeqOptions
    ) -> list[str]:
        """Return what each text becomes.

        Texts longer than the model takes are cut, with a warning that says how many.

        Raises:
            UsageError: An option is out of range, or the model reads no text.
        """
        if options.request.chat:
            raise UsageError("this model has no chat format; drop chat=True")
        limit = self.manifest.model.max_source
        rows, cut = tokenizer.encode_all(texts, limit)
        if cut:
            logger.warning("%d of %d texts were cut to %d tokens", cut, len(texts), limit)
        written = self.ids(rows, options)
        return [_until(tokenizer.decode(row), options.request.stops) for row in written]

    def ids(self, rows: Sequence[Sequence[int]], options: Seq2SeqOptions) -> list[list[int]]:
        """Return the tokens that each row of tokens becomes, the one that ends it included.

        Raises:
            UsageError: A row is empty or too long, or holds a token that the model does not have.
        """
        memory = self.read_tokens(rows)
        writer = DecoderLoop(self.reader.decoder, self.rules, options.request, options.explicit)
        return writer.write(memory, [[self._start()]] * len(rows))

    def transcribe(
        self,
        features: Any,
        tokenizer: Tokenizer,
        options: Seq2SeqOptions,
        spoken: tuple[str | None, str | None] = (None, None),
    ) -> list[str]:
        """Return the text of each recording.

        Args:
            features: [B, bands, frames] or [bands, frames] float, as the checkpoint's feature
                extractor makes them of 30 seconds.
            tokenizer: The artifact's.
            options: Options of generation.
            spoken: Language (detected where None) and task (``transcribe`` where None).

        Raises:
            UsageError: The features are of another shape, or language or task is not known.
        """
        memory = self.reader.read(self._sounds(features))
        writer = DecoderLoop(self.reader.decoder, self.rules, options.request, options.explicit)
        begin = self._spoken(writer, memory, *spoken)
        rows = writer.write(memory, begin)
        return [_until(tokenizer.decode(row), options.request.stops).strip() for row in rows]

    def read_tokens(self, rows: Sequence[Sequence[int]]) -> dict[str, Array]:
        """Return what the decoder is given for rows of tokens.

        Raises:
            UsageError: A row is empty or too long, or holds a token that the model does not have.
        """
        encoder, facts = self.reader.encoder, self.manifest.model
        if encoder.find(Role.TOKENS) is None:
            raise UsageError("this model takes audio, not text; pass features")
        if not rows or min(map(len, rows)) == 0:
            raise UsageError("the text is empty: give at least one token")
        if facts.max_source and max(map(len, rows)) > facts.max_source:
            raise UsageError(
                f"the text has {max(map(len, rows))} tokens and the model reads "
                f"{facts.max_source}; shorten it"
            )
        tokens, mask = pad(rows, padding_token(facts.pad, facts.eos), "right")
        check_tokens(tokens, facts.source_vocabulary or facts.vocabulary)
        named = {encoder.need(Role.TOKENS).name: tokens, encoder.need(Role.MASK).name: mask}
        return self.reader.read(named)

    def _start(self) -> int:
        start = self.manifest.model.start if self.rules.start is None else self.rules.start
        if start is None:
            raise LlmoptError(
                "the decoder's start token is unknown; add "
                "decoder_start_token_id to generation_config.json and compile again"
            )
        return start

    def _sounds(self, features: Any) -> dict[str, Array]:
        port = self.reader.encoder.find(Role.FEATURES)
        if port is None:
            raise UsageError("this model takes text, not audio")
        array = np.asarray(features, port.dtype)
        array = array[None] if array.ndim == 2 else array
        wanted = list(port.shape[1:])
        if array.ndim != 3 or list(array.shape[1:]) != wanted or not len(array):
            shape = ", ".join(map(str, wanted))
            raise UsageError(f"features should be [B, {shape}], not {list(np.shape(features))}")
        return {port.name: array}

    def _spoken(
        self,
        writer: DecoderLoop,
        memory: Mapping[str, Array],
        language: str | None,
        task: str | None,
    ) -> list[list[int]]:
        """Return what each transcript begins with: language and task, where there are several."""
        start, rules = self._start(), self.rules
        rows = len(next(iter(memory.values())))
        if not rules.languages:
            if language or task:
                raise UsageError(
                    "this model has a single language and task; omit language and task"
                )
            heard: Sequence[Sequence[int]] = [[]] * rows
        else:
            if language is None:
                found = writer.likeliest(memory, [start], sorted(rules.languages.values()))
            else:
                found = np.full(rows, _called(rules.languages, language, "language"))
            doing = _called(rules.tasks or {}, task or "transcribe", "task")
            heard = [[int(token), doing] for token in found]
        silent = [] if rules.no_timestamps is None else [rules.no_timestamps]
        return [[start, *row, *silent] for row in heard]


def _called(tokens: Mapping[str, int], name: str, kind: str) -> int:
    for spelling in (name, f"<|{name}|>"):
        if spelling in tokens:
            return tokens[spelling]
    known = ", ".join(sorted(each.strip("<|>") for each in tokens))
    raise UsageError(f"{kind} {name!r} is not known; known: {known}")


def _until(text: str, stops: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text
