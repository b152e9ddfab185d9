"""Run an artifact and its source on a matrix of inputs and compare what comes out.

The matrix: batch 1 and 3; 1, 7 and 33 tokens; no, left and right padding; and, for a cache, a
prefill followed by decode steps, which must equal one full pass of the source. The error is
``max|a - b| / max|b|`` over unpadded positions, case by case.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llmopt.errors import AccuracyError
from llmopt.frontend.reference import Reference, Transform
from llmopt.interface.arrays import Array, Arrays, Run
from llmopt.interface.signature import Role, Signature
from llmopt.interface.stepping import RunDecoder, Sequences, forced, one_by_one
from llmopt.ir.attention import AttentionAttributes
from llmopt.ir.components import FIRST, edge, is_steady, source_feeds
from llmopt.ir.feeds import Case, feeds
from llmopt.ir.images import illustrated
from llmopt.ir.program import Program

_LENGTHS: Final = (1, 7, 33)
_STEPS: Final = 4


@dataclass(frozen=True)
class Compared:
    """One case of the matrix.

    Args:
        label: The sizes and padding of the case.
        output: The output that was furthest off.
        error_rel: ``max|a - b| / max|b|`` over unpadded positions.
    """

    label: str
    output: str
    error_rel: float


@dataclass(frozen=True)
class Verification:
    """The cases that were checked, and how far off each was.

    Args:
        status: ``"passed"`` or ``"off"``.
        cases: Every case.
        tolerance: The largest error that is allowed.
        proven_by: The backend that ran the artifact, where that is not the target itself.
    """

    status: str
    cases: tuple[Compared, ...] = ()
    tolerance: float = 0.0
    proven_by: str = ""

    @property
    def worst(self) -> Compared | None:
        """The case that was furthest off."""
        return max(self.cases, key=lambda case: case.error_rel, default=None)

    def summary(self) -> dict[str, Any]:
        """Return what manifests and ``--json`` show."""
        worst = self.worst
        return ({"proven_by": self.proven_by} if self.proven_by else {}) | {
            "status": self.status,
            "cases": len(self.cases),
            "tolerance": self.tolerance,
            "worst_error_rel": None if worst is None else float(f"{worst.error_rel:.2g}"),
            "worst_case": None if worst is None else f"{worst.label} {worst.output}",
        }


def verify(
    program: Program,
    run: Run,
    reference: Reference,
    *,
    tolerance: float,
    transform: Transform | None = None,
) -> Verification:
    """Compare an artifact with its source on the matrix.

    Args:
        program: The Program, which says what inputs and outputs mean.
        run: The artifact.
        reference: The source.
        tolerance: The largest relative error of any case.
        transform: The change that was made to the source's weights on purpose.

    Raises:
        AccuracyError: a case is further off, or gives a number that is not finite.
    """
    result = Verification("passed", measure(program, run, reference, transform), tolerance)
    worst = result.worst
    if worst is not None and not worst.error_rel <= tolerance:
        raise AccuracyError(
            f"verification against the source failed at {worst.label}: error of {worst.output!r}",
            worst.error_rel,
            tolerance,
            "find the pass with --passes 'default,-NAME', and report it; --verify off skips this",
        )
    return result


def measure(
    program: Program, run: Run, reference: Reference, transform: Transform | None = None
) -> tuple[Compared, ...]:
    """Return how far a Program is from its source in each case of the matrix.

    Args:
        program: The Program, which says what inputs and outputs mean.
        run: A function that runs it, or what was lowered from it.
        reference: The source.
        transform: The change that was made to the source's weights on purpose.
    """
    cases = list(matrix(program))
    vocabulary = program.facts.model.vocabulary or 2
    batches = [_full_pass(program, case, vocabulary) for case in cases]
    compared = []
    for case, batch, wanted in zip(cases, batches, reference.run(batches, transform), strict=True):
        tokens = tokens_of(Case(case.batch, case.new + case.past, 0, case.padding), batch)
        if expected := comparable(program.signature, wanted, tokens):
            compared.append(compare(case.label, _run(program, run, case, batch), expected, tokens))
    return tuple(compared)


def matrix(program: Program) -> Iterator[Case]:
    """Yield the cases of a Program; ``past`` counts the tokens that are decoded one by one.

    All but the shortest have room for an image, where the Program takes any.
    """
    limit = program.facts.max_length or 1 << 20
    padded = program.signature.find(Role.MASK) is not None
    image = program.facts.model.image_length
    lengths = [n + image if n > 1 else n for n in _LENGTHS]
    for seed, length in enumerate(n for n in lengths if n <= limit):
        yield Case(1, length, 0, "none", seed)
        for padding in ("none", "left", "right") if padded and length > 1 else ("none",):
            yield Case(3, length, 0, padding, seed + 10)
    if program.signature.has_cache and limit >= 7 + image + _STEPS:
        yield Case(1, 7 + image, _STEPS, "none", 20)
        yield Case(3, 7 + image, _STEPS, "left", 21)
    if (window := _window(program)) and window + 7 <= min(limit, 600):
        yield Case(1, window + 5, 0, "none", 30)


def tokens_of(case: Case, batch: Arrays) -> Tokens:
    """Return where the tokens of a case are, and those of the encoder."""
    read = batch.get(f"{FIRST}attention_mask")
    return Tokens(case.mask() == 1, case.new, None if read is None else read == 1)


def _window(program: Program) -> int | None:
    windows = (size for n in program.graph for size in AttentionAttributes.of(n).window)
    return min((size + 1 for size in windows if size >= 0), default=None)


def _full_pass(program: Program, case: Case, vocabulary: int) -> Arrays:
    """Return the inputs of one full pass of the source: prefill and decoded tokens together."""
    full = Case(case.batch, case.new + case.past, 0, case.padding, case.seed)
    batch = without_caches(program, feeds(edge(program), full, vocabulary))
    batch = illustrated(program, batch, full.mask(), case.new, case.seed)
    return batch | source_inputs(program, case)


def without_caches(program: Program, batch: Arrays) -> Arrays:
    """Return the inputs that a source takes: no cache, and nothing that it hands over itself."""
    inner = {Role.PAST_KEY, Role.PAST_VALUE}
    if len(program.components) > 1:
        inner |= {*_FROM_ENCODER}
    left = {port.name for port in program.signature.inputs if port.role in inner}
    return {name: array for name, array in batch.items() if name not in left}


_FROM_ENCODER: Final = (Role.SOURCE_KEY, Role.SOURCE_VALUE, Role.SOURCE_MASK)
"""Inputs of a decoder that its encoder makes."""


def source_inputs(program: Program, case: Case) -> Arrays:
    """Return the inputs of the encoder that belong to a case of the decoder; {} without one."""
    return source_feeds(program, _source_case(case, program.facts.model.max_source))


def _source_case(case: Case, limit: int) -> Case:
    """Return a case of the encoder: of another length and padding."""
    length = {1: 7, 7: 33}.get(case.new, 1)
    padding = {"none": "left", "left": "right"}.get(case.padding, "none")
    return Case(case.batch, min(length, limit or length), 0, padding, case.seed + 100)


def _run(program: Program, run: Run, case: Case, batch: Arrays) -> Arrays:
    if not program.signature.has_cache:
        return run(batch)
    others: Arrays = {}

    def keeping(step: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        outputs = run(step)
        others.update({name: outputs[name] for name in _BEFORE if name in outputs})
        return outputs

    logits = decode(edge(program), keeping, batch, case.new)
    return {"logits": logits} | others


_READ: Final = "last_hidden_state"
_SEEN: Final = "image_features"
_BEFORE: Final = (_READ, _SEEN)
"""Outputs of the components before a decoder that a source has too."""


def decode(signature: Signature, run: Run, batch: Arrays, prefill: int) -> Array:
    """Return the logits [B, S, V] of a prefill and one step for each token after it.

    Args:
        signature: Inputs and outputs of ``run``.
        run: The artifact.
        batch: ``input_ids`` of all tokens; ``attention_mask``, if any are padded; and what is the
            same in every step, of a model of several components, or was read, of the last one
            alone.
        prefill: Tokens of the first step.
    """
    tokens, mask = batch["input_ids"], batch.get("attention_mask")
    rows, total = tokens.shape
    forwarded = {port.name for port in signature.inputs if port.role in _FROM_ENCODER}
    steady = {name: array for name, array in batch.items() if is_steady(name) or name in forwarded}
    sequences = Sequences(RunDecoder(signature, run), rows, total, steady)
    return forced(sequences, tokens, mask, one_by_one(prefill, total))


@dataclass(frozen=True)
class Tokens:
    """The positions of tokens among padding.

    Args:
        mask: [B, T] bool, of past and new ones.
        new: S, the number of new ones.
        read: [B, C] bool, of what an encoder reads; None if there is none.
    """

    mask: Array
    new: int
    read: Array | None = None

    def of(self, output: Array, *, cache: bool, read: bool = False) -> Array:
        """Return ``output`` [B, S, ...], or a cache [B, G, T, D], where there are tokens."""
        if read and self.read is not None:
            return output[self.read] if output.shape[:2] == self.read.shape else output
        if cache and output.ndim == 4:
            return output.swapaxes(1, 2)[self.mask]
        new = self.mask[:, self.mask.shape[1] - self.new :]
        return output[new] if output.shape[:2] == new.shape else output


def comparable(signature: Signature, wanted: Arrays, tokens: Tokens | None) -> Arrays:
    """Return the outputs that can be compared: not what may be taken from a token of padding.

    An output that is no row for each token is the source's choice of one, often the first.
    """
    if tokens is None or tokens.mask[:, 0].all():
        return wanted
    chosen = {p.name for p in signature.outputs if p.role == Role.OTHER and "S" not in p.shape}
    return {name: array for name, array in wanted.items() if name not in chosen}


def compare(
    label: str,
    actual: Arrays,
    expected: Arrays,
    tokens: Tokens | None,
    caches: Collection[str] = (),
) -> Compared:
    """Return the output that is furthest off.

    Args:
        label: The name of the case.
        actual: Outputs by name.
        expected: The outputs to compare with, by name.
        tokens: The positions of tokens; None if nothing is padded.
        caches: Names of outputs [B, G, T, D], whose third axis is that of tokens.
    """
    errors = []
    for name, right in expected.items():
        left = actual[name]
        if left.shape != right.shape:
            return Compared(f"{label}: shape {left.shape}, not {right.shape}", name, np.inf)
        pair = [left, right]
        if tokens is not None and name != _SEEN:
            pair = [tokens.of(each, cache=name in caches, read=name == _READ) for each in pair]
        errors.append(Compared(label, name, relative_error(*pair)))
    return max(errors, key=lambda each: each.error_rel)


def relative_error(actual: Array, expected: Array) -> float:
    """Return ``max|actual - expected| / max|expected|``; infinite where a number is not finite.

    >>> relative_error(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    0.5
    """
    if not np.all(np.isfinite(actual)) or actual.size == 0:
        return float("inf")
    scale = float(np.max(np.abs(expected))) or 1.0
    return float(np.max(np.abs(actual - expected))) / scale
