"""Whether a source is causal: changes tokens and looks at which outputs change."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llmopt.frontend.reference import Reference
from llmopt.interface.signature import Role, Signature
from llmopt.ir.feeds import Case, feeds

QUIET: Final = 1e-6  # relative: rounding may change an output by this much


def is_causal(
    reference: Reference, signature: Signature, name: str, vocabulary: int, tokens: int
) -> bool:
    """Return whether no token changes an earlier output, and each changes its own.

    Args:
        reference: The source.
        signature: Inputs of the source.
        name: Name of the output to compare, [B, S, ...].
        vocabulary: Number of token ids.
        tokens: Length of the sequences to try.
    """
    if tokens < 2:
        return False
    ids = next(p.name for p in signature.inputs if p.role == Role.TOKENS)
    base = feeds(signature, Case(batch=2, new=tokens), vocabulary or 2)
    positions = sorted({tokens - 1, tokens // 2})
    changed = []
    for position in positions:
        moved = base[ids].copy()
        moved[:, position] = (moved[:, position] + 1) % (vocabulary or 2)
        changed.append({**base, ids: moved})
    first, *rest = [outputs[name] for outputs in reference.run([base, *changed])]
    return all(
        _only_from(first, other, position) for position, other in zip(positions, rest, strict=True)
    )


def _only_from(before: npt.NDArray[Any], after: npt.NDArray[Any], position: int) -> bool:
    if before.ndim != 3 or before.shape[1] <= position:
        return False
    moved = np.abs(after.astype(np.float64) - before).max(axis=(0, 2))
    quiet = QUIET * np.abs(before).max()
    return bool(np.all(moved[:position] <= quiet) and moved[position] > quiet)
