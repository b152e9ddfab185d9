"""Writing a sequence for one that was read: greedily, at random, or by beam search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from llmopt.errors import UsageError
from llmopt.interface.arrays import Array
from llmopt.interface.signature import forwarded
from llmopt.interface.stepping import Sequences
from llmopt.runtime.beam_search import Beams, Search, log_softmax
from llmopt.runtime.generation import Request, capacity_for, padding_token
from llmopt.runtime.logits_processors import Rules
from llmopt.runtime.sampling import Sampler
from llmopt.runtime.session import Session

_NEW: Final = 128  # tokens, where neither the caller nor the checkpoint says how many


@dataclass(frozen=True)
class EncoderRun:
    """The model that reads, beside the one that writes.

    Args:
        encoder: Session of the encoder.
        decoder: Session of the decoder that takes its outputs.
    """

    encoder: Session
    decoder: Session

    def read(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return what the decoder is given in every step.

        Args:
            feeds: The encoder's inputs, by name.
        """
        handed = forwarded(self.encoder.signature, self.decoder.signature)
        outputs = [name for name in handed.values() if name in self.encoder.outputs]
        found = {**feeds, **self.encoder.run(feeds, outputs)}
        return {name: found[origin] for name, origin in handed.items()}


class DecoderLoop:
    """Writes sequences for what was read.

    Args:
        session: The decoder.
        rules: Tokens that the checkpoint forbids, forces and prefers.
        request: Options of the request; the rules fill in what it leaves open.
        explicit: Names of the options that were set.

    Raises:
        UsageError: An option is out of range, or does not go with another.
    """

    def __init__(
        self, session: Session, rules: Rules, request: Request, explicit: frozenset[str]
    ) -> None:
        self._session = session
        self._rules = _ended_by(rules, session.manifest.model.eos, request)
        self._request = request
        self._explicit = explicit
        self._beams = rules.beams if request.beams is None else request.beams
        drawn = request.temperature > 0
        if drawn and request.beams not in (None, 1):
            raise UsageError(
                "beams and temperature conflict: beam search does not sample; drop one"
            )
        if drawn:
            self._beams = 1
        for name in ("length_penalty", "early_stopping"):
            if self._beams == 1 and getattr(request, name) is not None:
                raise UsageError(f"{name} has no effect without beams; leave it out")
        _ = self._search(1)  # checks the ranges

    def write(
        self, memory: Mapping[str, Array], starts: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """Return the tokens after each beginning, the one that ended it included.

        Args:
            memory: Inputs of the decoder that are the same in every step, a row for each sequence.
            starts: First tokens of each sequence; all are of equal length.
        """
        search = self._search(len(starts[0]))
        if search.limit <= len(starts[0]):
            raise UsageError(
                f"a sequence may have {search.limit} tokens and begins with {len(starts[0])}: "
                "there is no room to generate; shorten the prompt"
            )
        written = self._one_each if self._beams == 1 else self._searched
        return [row[search.begun :] for row in written(memory, starts, search)]

    def likeliest(
        self, memory: Mapping[str, Array], start: Sequence[int], of: Sequence[int]
    ) -> Array:
        """Return for each row which token of ``of`` is likeliest after ``start``."""
        rows = len(next(iter(memory.values())))
        sequences = self._sequences(memory, rows, len(start))
        logits = sequences.extend(np.array([start] * rows, np.int64))[:, -1]
        found: Array = np.asarray(of)[logits[:, list(of)].argmax(axis=-1)]
        return found

    def _search(self, begun: int) -> Search:
        facts, rules, request = self._session.manifest.model, self._rules, self._request
        limit = begun + request.max_new_tokens
        if "max_new_tokens" not in self._explicit:
            limit = rules.max_length or begun + _NEW
        penalty, stopping = request.length_penalty, request.early_stopping
        return Search(
            beams=self._beams,
            length_penalty=rules.length_penalty if penalty is None else penalty,
            early_stopping=rules.early_stopping if stopping is None else stopping,
            eos=frozenset(rules.eos),
            begun=begun,
            limit=min(limit, facts.max_length or limit),
        )

    def _sequences(self, memory: Mapping[str, Array], rows: int, limit: int) -> Sequences:
        room = capacity_for(limit, self._session.manifest.model.max_length)
        return Sequences(self._session, rows, room, memory)

    def _one_each(
        self, memory: Mapping[str, Array], starts: Sequence[Sequence[int]], search: Search
    ) -> list[list[int]]:
        rows = [list(start) for start in starts]
        running = [True] * len(rows)
        facts = self._session.manifest.model
        fill = padding_token(facts.pad, facts.eos)
        sampler = Sampler(self._request.sampling, len(rows))
        sequences = self._sequences(memory, len(rows), search.limit)
        fed = [list(row) for row in rows]
        logits = sequences.extend(np.array(fed, np.int64))
        while True:
            scores = self._rules.apply(_copied(logits), fed, search.begun, search.limit)
            chosen = sampler.choose(scores).tolist()
            for i, token in enumerate(chosen):
                if running[i]:
                    rows[i].append(token)
                    running[i] = token not in search.eos
                fed[i].append(token if running[i] else fill)
            if not any(running) or len(fed[0]) >= search.limit:
                return rows
            logits = sequences.extend(np.array([row[-1:] for row in fed], np.int64))

    def _searched(
        self, memory: Mapping[str, Array], starts: Sequence[Sequence[int]], search: Search
    ) -> list[list[int]]:
        each = [Beams(search, start) for start in starts]
        count = search.beams
        repeated = {name: np.repeat(array, count, axis=0) for name, array in memory.items()}
        sequences = self._sequences(repeated, len(each) * count, search.limit)
        logits = sequences.extend(np.array([r for b in each for r in b.running], np.int64))
        while True:
            rows = [row for beams in each for row in beams.running]
            logs = log_softmax(_copied(logits))
            logs = self._rules.apply(logs, rows, search.begun, search.limit)
            origins: list[int] = []
            for i, beams in enumerate(each):
                part = slice(i * count, (i + 1) * count)
                origins += [i * count + place for place in beams.advance(logs[part])]
            if all(beams.over for beams in each):
                return [beams.best for beams in each]
            sequences.reorder(origins)
            logits = sequences.extend(np.array([r[-1:] for b in each for r in b.running], np.int64))


def _copied(logits: Array) -> Array:
    return np.array(logits[:, -1], np.float32)


def _ended_by(rules: Rules, eos: Sequence[int], request: Request) -> Rules:
    stop = request.stop_tokens
    return replace(rules, eos=tuple(map(int, (rules.eos or eos) if stop is None else stop)))
