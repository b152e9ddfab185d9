"""Ask a source whether it is causal, by moving tokens and looking at what moves."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llmopt.frontend.reference import Reference
from llmopt.interface.signature import Role, Signature
from llmopt.ir.feeds import Case, feeds

QUIET: Final = 1e-6  # relative: what rounding may move, and no token does


def is_causal(
    reference: Reference, signature: Signature, name: str, vocabulary: int, tokens: int
) -> bool:
    """Whether no token moves an output before it, and each moves its own.

    Args:
        reference: The source.
        signature: Its inputs.
        name: The output to look at, [B, S, ...].
        vocabulary: Tokens are below this.
        tokens: How many to try with.
    """
    if tokens < 2:
        return False
    ids = next(p.name for p in signature.inputs if p.role == Role.TOKENS)
    base = feeds(signature, Case(batch=2, new=tokens), vocabulary or 2)
    places = sorted({tokens - 1, tokens // 2})
    changed = []
    for place in places:
        moved = base[ids].copy()
        moved[:, place] = (moved[:, place] + 1) % (vocabulary or 2)
        changed.append({**base, ids: moved})
    first, *rest = [found[name] for found in reference.run([base, *changed])]
    return all(_only_from(first, other, place) for place, other in zip(places, rest, strict=True))


def _only_from(before: npt.NDArray[Any], after: npt.NDArray[Any], place: int) -> bool:
    if before.ndim != 3 or before.shape[1] <= place:
        return False
    moved = np.abs(after.astype(np.float64) - before).max(axis=(0, 2))
    quiet = QUIET * np.abs(before).max()
    return bool(np.all(moved[:place] <= quiet) and moved[place] > quiet)
