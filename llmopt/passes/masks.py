"""What an attention mask means, learned by evaluating it.

A mask that only depends on padding, positions and sizes is compared, on probes that tell the
possibilities apart, with ``not padding, not later than the query, not before its window``. What
agrees everywhere is replaced by attributes; what does not stays an explicit mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llmopt.interface.signature import Role
from llmopt.ir.feeds import Case, feeds
from llmopt.ir.probe import Probe
from llmopt.ir.program import Program
from llmopt.passes.fuse_attention import FORBIDDEN

Bools = npt.NDArray[np.bool_]
LONGEST_SQUARE = 4200  # a probe of more queries than this takes too long
UNBOUNDED = 1 << 20  # the longest sequence where a model does not say


@dataclass(frozen=True)
class Meaning:
    """What a mask lets each query attend to.

    Args:
        causal: Only keys at or before the query.
        left: Only keys at most this far before the query; -1 is unbounded.
        right: Only keys at most this far after the query; -1 is unbounded.
        padding: Only keys that ``attention_mask`` marks.
    """

    causal: bool = False
    left: int = -1
    right: int = -1
    padding: bool = False

    @property
    def placed(self) -> bool:
        """Whether it matters where a query stands among the keys."""
        return self.causal or self.left >= 0 or self.right >= 0


def understand(program: Program, mask: ir.Value) -> Meaning | str:
    """Return the meaning of ``mask``, or why it must stay explicit."""
    probe = Probe(program, [mask])
    if (reason := probe.obstacle()) is not None:
        return reason
    port = program.signature.find(Role.MASK)
    allowed_inputs = {p.name for p in program.signature.inputs if p.role in _POSITIONAL}
    if extra := probe.reads() - allowed_inputs:
        return f"it depends on {', '.join(sorted(extra))}"
    padded = port is not None and port.name in probe.reads()
    cases = _cases(program, probe, padded=padded)
    if isinstance(cases, str):
        return cases
    samples = []
    for case in cases:
        values = _evaluate(program, probe, case)
        if isinstance(values, str):
            return values
        samples.append((case, values))
    return _explain(samples, padded=padded)


_POSITIONAL = (Role.MASK, Role.POSITIONS)


def _cases(program: Program, probe: Probe, *, padded: bool) -> list[Case] | str:
    """Return probes: small ones of every padding, and one as long as any constant tells."""
    cached = program.signature.has_cache
    paddings = ("none", "left", "right") if padded else ("none",)
    cases = [Case(3, 5, past, side) for past in ((0, 4) if cached else (0,)) for side in paddings]
    longest = program.facts.max_length or UNBOUNDED
    length = min(max(lengths(probe, longest), default=0), longest)
    if cached and length > 3:
        cases.append(Case(1, 3, length - 3))
    elif length > LONGEST_SQUARE:
        return f"it may change at {length} tokens, too many to try"
    elif length:
        cases.append(Case(1, length))
    return cases


def lengths(probe: Probe, longest: int) -> Iterator[int]:
    """Yield how many tokens it takes to see what each constant does: a window, or a table."""
    for value in probe.inputs:
        if value.const_value is None:
            continue
        if value.const_value.size > 8:
            yield from (size for size in value.const_value.shape.numpy() if size > 1)
            continue
        for number in np.asarray(value.const_value.numpy(), np.float64).reshape(-1):
            # a large negative number fills what is masked
            if number > FORBIDDEN and 1 <= abs(number) < longest:
                yield int(abs(number)) + 7


def _evaluate(program: Program, probe: Probe, case: Case) -> Bools | str:
    sizes = {"B": case.batch, "S": case.new, "P": case.past, "T": case.past + case.new}
    arrays = feeds(program.signature, case, 2, probe.reads())
    found = probe.attempt(arrays, sizes)
    if isinstance(found, str):
        return found
    allowed = allowed_by(found[0])
    if isinstance(allowed, str):
        return allowed
    shape = (case.batch, 1, case.new, case.past + case.new)
    if not probe.reads() and np.all(allowed):  # of as many tokens as there are, pixels or others
        return np.ones((case.batch, *shape[2:]), np.bool_)
    try:
        if allowed.ndim == 4 and allowed.shape[1] > 1:
            if np.any(allowed != allowed[:, :1]):
                return "it differs from head to head"
            allowed = allowed[:, :1]
        return np.broadcast_to(allowed, shape)[:, 0]
    except ValueError:
        return f"its shape {allowed.shape} does not broadcast to {shape}"


def allowed_by(mask: npt.NDArray[Any]) -> Bools | str:
    """Return where a mask allows attention, or why it is more than a mask."""
    if mask.dtype == np.bool_:
        return mask
    allowed = np.abs(mask) < 1e-6
    if not np.all(allowed | (mask <= FORBIDDEN)):
        return "it holds values other than 0 and minus infinity"
    return np.asarray(allowed)


def _explain(samples: list[tuple[Case, Bools]], *, padded: bool) -> Meaning | str:
    reach = [_reach(case, allowed) for case, allowed in samples]
    full_left = [case.past + case.new - 1 for case, _ in samples]
    full_right = [case.new - 1 for case, _ in samples]
    left, right = max(r[0] for r in reach), max(r[1] for r in reach)
    causal = right <= 0 < max(full_right)
    meaning = Meaning(
        causal,
        -1 if left >= max(full_left) else left,
        -1 if causal or right >= max(full_right) else right,
        padding=padded,
    )
    for case, allowed in samples:
        expected, rows = predict(meaning, case)
        if np.any((allowed != expected)[rows]):
            return f"it is not a combination of causal, window and padding masks (at {case.label})"
    return meaning


def _reach(case: Case, allowed: Bools) -> tuple[int, int]:
    """Return how far before and after itself a query of an unpadded row 0 sees."""
    query, key = np.nonzero(allowed[0])
    distance = query + case.past - key
    return int(distance.max(initial=0)), int((-distance).max(initial=0))


def predict(meaning: Meaning, case: Case) -> tuple[Bools, Bools]:
    """Return what ``meaning`` allows, [B, S, T], and which queries are not padding, [B, S]."""
    present = case.mask() == 1
    distance = (np.arange(case.new) + case.past)[:, None] - np.arange(case.past + case.new)
    allowed = np.ones_like(distance, np.bool_)
    if meaning.causal:
        allowed &= distance >= 0
    if meaning.left >= 0:
        allowed &= distance <= meaning.left
    if meaning.right >= 0:
        allowed &= -distance <= meaning.right
    keys = present[:, None, :] if meaning.padding else np.ones_like(present)[:, None, :]
    return allowed[None] & keys, present[:, case.past :]
