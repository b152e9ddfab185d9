"""Writing the example that an artifact tests itself with on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llmopt.interface.arrays import Arrays, Run
from llmopt.interface.signature import Role
from llmopt.interface.stepping import RunDecoder, Sequences
from llmopt.ir.components import edge, is_steady, source_feeds
from llmopt.ir.feeds import Case, feeds, positions
from llmopt.ir.images import illustrated
from llmopt.ir.program import Program
from llmopt.runtime.golden import Golden, columns_of, kept
from llmopt.runtime.tokenizer import TOKENIZER, Tokenizer

ROWS: Final = 2
TOKENS: Final = 16
PREFILL: Final = 8
PADDED: Final = 3
TEXT: Final = "The sky is blue, isn't it? Naïve 数 🙂 42."
_SHOWN: Final = (Role.LOGITS, Role.HIDDEN, Role.EMBEDDING, Role.OTHER)


def make_golden(program: Program, run: Run, artifact: Path, rows: int = ROWS) -> Golden:
    """Return inputs, and what an artifact makes of them here; how far off others may be is 0.

    Args:
        program: Meaning of inputs and outputs.
        run: The artifact, or what is proven in its place.
        artifact: Folder of the artifact, for the tokenizer.
        rows: Sequences.
    """
    tokens = tuple(Tokenizer(artifact).encode(TEXT)) if (artifact / TOKENIZER).is_file() else ()
    if program.signature.find(Role.LOGITS) is not None and program.signature.has_cache:
        longest = program.facts.model.max_source or PREFILL
        read = source_feeds(program, Case(rows, min(PREFILL, longest), 0, "right"))
        made = _decoder(program, run, _beginning(program, tokens, rows) | read)
    else:
        made = _plain(program, run, rows)
    return replace(made, text=TEXT, tokens=tokens) if tokens else made


def _plain(program: Program, run: Run, rows: int) -> Golden:
    """Return random inputs, one row padded behind where there is a mask, run once."""
    limit = program.facts.max_length or PREFILL
    masked = program.signature.find(Role.MASK) is not None
    case = Case(rows, min(limit, PREFILL), 0, "right" if masked else "none")
    given = feeds(program.signature, case, program.facts.model.vocabulary or 2)
    found = run(given)
    shown = [port.name for port in program.signature.outputs if port.role in _SHOWN]
    mask = case.mask() if masked else None
    return Golden(
        inputs=given,
        outputs={name: kept(found[name], mask) for name in shown},
        scales={name: _scale(found[name]) for name in shown},
    )


def _beginning(program: Program, tokens: Sequence[int], rows: int) -> Arrays:
    """Return the inputs of a decoder, the tokens after the first step still to come.

    Each row begins elsewhere in the text; the last is padded in front if there is a mask. There is
    an image in the midst of each, where the model sees any.
    """
    vocabulary = program.facts.model.vocabulary or 2
    length = TOKENS + program.facts.model.image_length
    length = min(length, program.facts.max_length or length)
    prefill = _prefill(program, length)
    text = (
        np.asarray(tokens or np.random.default_rng(0).integers(0, vocabulary, TOKENS)) % vocabulary
    )
    ids = np.zeros((rows, length), np.int64)
    for row in range(rows):
        ids[row, :prefill] = np.resize(np.roll(text, -row * PREFILL), prefill)
    mask = np.ones_like(ids)
    if program.signature.find(Role.MASK) is not None and rows > 1 and prefill > PADDED:
        mask[-1, :PADDED] = 0
    begun = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
    return illustrated(program, begun, mask, prefill)


def _decoder(program: Program, run: Run, batch: Arrays) -> Golden:
    """Return the tokens that a decoder goes on with, the likeliest each, and their logits.

    Of its own text it is sure, as it never is of random tokens.
    """
    mask, ids = batch["attention_mask"], batch["input_ids"].copy()
    inputs = {name: array for name, array in batch.items() if name != "position_ids"}
    rows, length = ids.shape
    prefill = _prefill(program, length)
    steady = {name: array for name, array in batch.items() if is_steady(name)}
    sequences = Sequences(RunDecoder(edge(program), run), rows, length, steady)
    step = sequences.extend(ids[:, :prefill], mask[:, :prefill], every=True)
    parts = [step.astype(np.float32)]
    for end in range(prefill, length):
        ids[:, end] = _likeliest(program, step[:, -1])
        step = sequences.extend(ids[:, end : end + 1], every=True)
        parts.append(step.astype(np.float32))
    logits = np.concatenate(parts, axis=1)
    columns = columns_of(logits)
    return Golden(
        inputs=inputs | {"input_ids": ids},
        outputs={
            "columns": columns,
            "logits": np.take_along_axis(logits, columns.astype(np.int64), axis=-1),
        },
        scales={"logits": _scale(logits[mask == 1])},
        prefill=prefill,
    )


def _likeliest(program: Program, logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the likeliest token of each row; no image follows the text."""
    image = program.facts.model.image_token
    shown = logits
    if image is not None:
        shown = np.where(np.arange(logits.shape[-1]) == image, -np.inf, logits)
    best: npt.NDArray[Any] = shown.argmax(axis=-1)
    return best


def _prefill(program: Program, length: int) -> int:
    return max(1, min(PREFILL + program.facts.model.image_length, length - 1))


def _scale(output: npt.NDArray[Any]) -> float:
    return float(np.abs(output.astype(np.float32)).max(initial=0.0))
