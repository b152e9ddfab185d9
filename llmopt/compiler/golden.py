"""Writing the example that an artifact tests itself with on a device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from llmopt.evaluation import sample
from llmopt.ir.feeds import Arrays, Case, feeds, positions
from llmopt.ir.program import Program, Role
from llmopt.runtime.golden import Golden, columns_of, kept
from llmopt.runtime.tokens import TOKENIZER, Tokenizer
from llmopt.verification import Run, decode

ROWS: Final = 2
TOKENS: Final = 16
PREFILL: Final = 8
PADDED: Final = 3
ROUNDED: Final = 5e-2
"""What is allowed where activations become int8: each processor's kernels group them their way."""
TEXT: Final = "The sky is blue, isn't it? Naïve 数 🙂 42."  # noqa: RUF001 - tokens of every kind
_SHOWN: Final = (Role.LOGITS, Role.HIDDEN, Role.EMBEDDING, Role.OTHER)


def make_golden(
    program: Program, run: Run, tolerance: float, made_with: str, rows: int = ROWS
) -> Golden:
    """Return inputs, and what an artifact makes of them here.

    A decoder's tokens are its own text, sampled with a fixed seed, one row padded in front where
    it takes a mask: of those it is sure of some, as it never is of random ones.

    Args:
        program: What inputs and outputs mean.
        run: The artifact, or what is proven in its place.
        tolerance: How far off a device may be, relative.
        made_with: The target that ``run`` is of.
        rows: How many sequences.
    """
    if program.facts.task == "generate" and program.signature.has_cache:
        return replace(_decoder(program, run, rows), tolerance=tolerance, made_with=made_with)
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
        tolerance=tolerance,
        scales={name: _scale(found[name]) for name in shown},
        made_with=made_with,
    )


def with_text(golden: Golden, folder: Path) -> Golden:
    """Return the example with the tokens of a text, where the artifact has a tokenizer."""
    if not (folder / TOKENIZER).is_file():
        return golden
    from dataclasses import replace

    return replace(golden, text=TEXT, tokens=tuple(Tokenizer(folder).encode(TEXT)))


def _decoder(program: Program, run: Run, rows: int) -> Golden:
    length = min(TOKENS, program.facts.max_length or TOKENS)
    prefill = max(1, min(PREFILL, length - 1))
    batch = _tokens(program, run, rows, length)
    logits = decode(program.signature, run, batch, prefill).astype(np.float32)
    columns = columns_of(logits)
    mask = batch["attention_mask"]
    return Golden(
        inputs={name: batch[name] for name in ("input_ids", "attention_mask")},
        outputs={
            "columns": columns,
            "logits": np.take_along_axis(logits, columns.astype(np.int64), axis=-1),
        },
        tolerance=0.0,
        scales={"logits": _scale(logits[mask == 1])},
        prefill=prefill,
    )


def _tokens(program: Program, run: Run, rows: int, length: int) -> Arrays:
    """Return rows of the model's own text, the last padded in front if it takes a mask."""
    masked = program.signature.find(Role.MASK) is not None
    ids = sample(program, run, rows, length - 1)
    mask = np.ones_like(ids)
    if masked and rows > 1 and length > 2 * PADDED:
        mask[-1, :PADDED] = 0
        ids[-1] = np.roll(ids[-1], PADDED)
        ids[-1, :PADDED] = ids[0, 0]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}


def _scale(output: np.ndarray) -> float:
    return float(np.abs(output).max(initial=0.0))
