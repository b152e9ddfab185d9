"""A decoder with a cache, run step by step, against the one without in one pass."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from llmopt.errors import LlmoptError, NotIncrementalError
from llmopt.interface.arrays import Array
from llmopt.interface.signature import Role
from llmopt.interface.stepping import RunDecoder, Sequences, forced
from llmopt.ir.evaluator import Evaluator
from llmopt.ir.program import Program

Ints = npt.NDArray[np.int64]

TOLERANCE: Final = 1e-4  # relative, float32: the same sums in another order
_STEPS: Final = (4, 2, 1, 1)
"""Tokens of a prefill, of a second part of a prompt, and of two steps of decoding."""
_BATCH: Final = 2
_PADDED: Final = 2


def check_steps(plain: Program, cached: Program) -> None:
    """Run both on the same tokens and compare the logits.

    Args:
        plain: The decoder without a cache.
        cached: The decoder with one.

    Raises:
        NotIncrementalError: they differ, or one cannot be run.
    """
    steps = _steps(plain.facts.max_length)
    tokens = np.random.default_rng(0).integers(
        0, plain.facts.model.vocabulary or 2, (_BATCH, sum(steps))
    )
    mask = np.ones_like(tokens)
    if cached.signature.find(Role.MASK) is not None and steps[0] > _PADDED:
        mask[1, :_PADDED] = 0
    try:
        expected = _one_pass(plain, tokens, mask)
        stepped = _step_by_step(cached, tokens, mask, steps)
    except LlmoptError as error:
        raise NotIncrementalError("logits", f"the check could not be run: {error}") from error
    real = mask == 1
    scale = float(np.abs(expected[real]).max()) or 1.0
    error_rel = float(np.abs(stepped[real] - expected[real]).max()) / scale
    if not error_rel <= TOLERANCE:
        reason = f"step by step it is off by {error_rel:.2g} relative from one full pass"
        raise NotIncrementalError("logits", reason)


def _steps(limit: int) -> tuple[int, ...]:
    """Return as many tokens a step as a sequence has room for."""
    return _STEPS if not limit or limit >= sum(_STEPS) else (1,) * limit


def _one_pass(program: Program, tokens: Ints, mask: Ints) -> Array:
    total = tokens.shape[1]
    if program.signature.find(Role.MASK) is not None:
        return _step_by_step(program, tokens, mask, (total,))
    logits: list[Array] = []  # without a mask each row is run alone
    for row, real in zip(tokens, mask == 1, strict=True):
        alone = row[real][None]
        (found,) = _step_by_step(program, alone, np.ones_like(alone), alone.shape[1:])
        logits.append(np.zeros((total, found.shape[-1]), found.dtype))
        logits[-1][real] = found
    return np.stack(logits)


def _step_by_step(program: Program, tokens: Ints, mask: Ints, steps: tuple[int, ...]) -> Array:
    decoder = RunDecoder(program.signature, Evaluator(program.model).run)
    return forced(Sequences(decoder, *tokens.shape), tokens, mask, steps)
