"""A decoder with a cache, run step by step, against the one without in one pass."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llmopt.errors import LlmoptError, NotIncrementalError
from llmopt.interface.arrays import Arrays
from llmopt.interface.signature import Role
from llmopt.ir.evaluator import Evaluator
from llmopt.ir.feeds import positions, resolve
from llmopt.ir.program import Program

TOLERANCE: Final = 1e-4  # relative, float32: the same sums in another order
_STEPS: Final = (4, 2, 1, 1)
"""Tokens of a prefill, of a second part of a prompt, and of two steps of decoding."""
_BATCH: Final = 2
_PADDED: Final = 2


def check_steps(whole: Program, made: Program) -> None:
    """Run both on the same tokens and compare the logits.

    Args:
        whole: The decoder without a cache.
        made: The decoder with one.

    Raises:
        NotIncrementalError: they differ, or one cannot be run.
    """
    steps = _steps(whole.facts.max_length)
    tokens = np.random.default_rng(0).integers(
        0, whole.facts.model.vocabulary or 2, (_BATCH, sum(steps))
    )
    mask = np.ones_like(tokens)
    if made.signature.find(Role.MASK) is not None and steps[0] > _PADDED:
        mask[1, :_PADDED] = 0
    try:
        wanted = _one_pass(whole, tokens, mask)
        found = _step_by_step(made, tokens, mask, steps)
    except LlmoptError as error:
        raise NotIncrementalError("logits", f"the check could not be run: {error}") from error
    real = mask == 1
    scale = float(np.abs(wanted[real]).max()) or 1.0
    error_rel = float(np.abs(found[real] - wanted[real]).max()) / scale
    if not error_rel <= TOLERANCE:
        reason = f"step by step it is off by {error_rel:.2g} relative from one full pass"
        raise NotIncrementalError("logits", reason)


def _steps(limit: int) -> tuple[int, ...]:
    """Return as many tokens a step as a sequence has room for."""
    return _STEPS if not limit or limit >= sum(_STEPS) else (1,) * limit


def _one_pass(
    program: Program, tokens: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]
) -> npt.NDArray[Any]:
    evaluator, name = Evaluator(program.model), program.signature.outputs[0].name
    if program.signature.find(Role.MASK) is not None:
        return evaluator.run(_feeds(program, tokens, mask, 0))[name]
    logits: list[npt.NDArray[Any]] = []  # without a mask each row is run alone
    for row, real in zip(tokens, mask == 1, strict=True):
        alone = row[real][None]
        (found,) = evaluator.run(_feeds(program, alone, np.ones_like(alone), 0))[name]
        logits.append(np.zeros((len(row), found.shape[-1]), found.dtype))
        logits[-1][real] = found
    return np.stack(logits)


def _step_by_step(
    program: Program,
    tokens: npt.NDArray[np.int64],
    mask: npt.NDArray[np.int64],
    steps: tuple[int, ...],
) -> npt.NDArray[Any]:
    evaluator = Evaluator(program.model)
    signature = program.signature
    pasts = [p for p in signature.inputs if p.role in (Role.PAST_KEY, Role.PAST_VALUE)]
    sizes = {"B": _BATCH, "P": 0}
    caches = {p.name: np.zeros([resolve(d, sizes) for d in p.shape], p.dtype) for p in pasts}
    logits, start = [], 0
    for count in steps:
        end = start + count
        given = _feeds(program, tokens[:, start:end], mask[:, :end], start)
        found = evaluator.run({**given, **caches, Role.LOGITS_TO_KEEP: np.asarray(0, np.int64)})
        logits.append(found[signature.outputs[0].name])
        presents = (found[port.name] for port in signature.outputs[1:])
        caches = dict(zip(caches, presents, strict=True))
        start = end
    return np.concatenate(logits, axis=1)


def _feeds(
    program: Program, tokens: npt.NDArray[np.int64], mask: npt.NDArray[np.int64], start: int
) -> Arrays:
    by_role = {
        Role.TOKENS: tokens,
        Role.MASK: mask,
        Role.POSITIONS: positions(mask)[:, start:],
    }
    return {
        port.name: by_role[Role(port.role)].astype(port.dtype)
        for port in program.signature.inputs
        if port.role in by_role
    }
