"""The measured cost of quantization: an artifact against its source on the same text.

`measure_quality` serves ``compile``, which has the Program; `evaluate` compares an artifact
with any reference, on the user's text or on the artifact's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from llmopt.errors import AccuracyError, UsageError
from llmopt.interface.arrays import Arrays, Run
from llmopt.interface.signature import Role, Signature
from llmopt.interface.stepping import RunDecoder, Sequences
from llmopt.ir.components import edge, source_feeds
from llmopt.ir.feeds import Case, feeds
from llmopt.ir.program import Program
from llmopt.quantization.evaluation import Estimate, Quality, QualityMeter
from llmopt.runtime import Runner

if TYPE_CHECKING:
    from llmopt.frontend.reference import Reference

Tokens = npt.NDArray[np.int64]
Results = Callable[[Sequence[Tokens]], Iterator[Arrays]]
"""Yields the outputs, logits of every token among them, of each row [S] of tokens."""
ROWS: Final = 8
READ: Final = 24  # tokens of the encoder's input, in an encoder-decoder model
TOKENS: Final = 88  # 8 x 88 positions: enough for a 99th percentile
WINDOW: Final = 256
WINDOWS: Final = 16  # at most, of a longer text: 4096 positions suffice


def measure_quality(program: Program, run: Run, reference: Reference) -> dict[str, Any]:
    """Return the quality of ``run`` against its source, rounded to three digits.

    For a language model: mean and 99th-percentile KL divergence and top-1 agreement on text
    that it generates itself, sampled at temperature 1 from its own start token. For any other:
    the cosine of its main output to the source's, on random tokens.
    """
    if program.signature.has_cache and program.signature.find(Role.LOGITS) is not None:
        return _language(program, run, reference)
    return _similarity(program, run, reference)


def _language(program: Program, run: Run, reference: Reference) -> dict[str, Any]:
    longest = (program.facts.max_length or TOKENS + 1) - 1
    read = source_feeds(program, Case(ROWS, _source_length(program), 0, "right", seed=1))
    tokens = sample(program, run, read, min(TOKENS, longest))
    meter = QualityMeter()
    decoder = RunDecoder(edge(program), run)
    steady = [{name: array[i : i + 1] for name, array in read.items()} for i in range(len(tokens))]
    batches = [full_feeds(row[None, :-1]) | own for row, own in zip(tokens, steady, strict=True)]
    for row, own, wanted in zip(tokens, steady, reference.run(batches), strict=True):
        sequences = Sequences(decoder, 1, len(row) - 1, own)
        logits = sequences.extend(row[None, :-1], every=True)
        meter.add(wanted["logits"][0], logits[0], row[1:])
    result = meter.result()
    return {
        "text": f"{ROWS} x {tokens.shape[1] - 1} tokens written by the model itself",
        "samples": result.samples,
        "kl_mean": _digits(result.kl_mean.value),
        "kl_mean_error": _digits(result.kl_mean.error),
        "kl_p99": None if result.kl_p99 is None else _digits(result.kl_p99.value),
        "top1": _digits(result.top1.value),
        "top1_error": _digits(result.top1.error),
    }


def _source_length(program: Program) -> int:
    return min(READ, program.facts.model.max_source or READ)


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def full_feeds(tokens: npt.NDArray[np.int64]) -> Arrays:
    """Return the inputs of one full pass over ``tokens`` [B, S] without padding."""
    return {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape).copy(),
    }


def sample(program: Program, run: Run, read: Arrays, length: int) -> npt.NDArray[np.int64]:
    """Return [ROWS, length + 1] tokens that the artifact samples at temperature 1, seeded.

    Args:
        program: Program with the signature and facts.
        run: The artifact.
        read: Inputs of the encoder, in an encoder-decoder model.
        length: Number of tokens to sample.
    """
    rng = np.random.default_rng(0)
    model = program.facts.model
    start = next((t for t in (model.start, model.bos, *model.eos) if t is not None), 0)
    tokens = np.full((ROWS, length + 1), start, np.int64)
    sequences = Sequences(RunDecoder(edge(program), run), ROWS, length, read)
    for i in range(length):
        scores = sequences.extend(tokens[:, i : i + 1])[:, -1].astype(np.float64)
        noise = rng.gumbel(size=scores.shape)  # the largest of score + noise is a sample
        tokens[:, i + 1] = np.argmax(scores + noise, axis=1)
    return tokens


def _similarity(program: Program, run: Run, reference: Reference) -> dict[str, Any]:
    """Return the cosine of the last output to the source's: mean and lowest over tokens."""
    vocabulary = program.facts.model.vocabulary or 2
    limit = program.facts.max_length or 64
    cases = [Case(2, min(limit, 8 + 8 * i), 0, "right", i) for i in range(6)]
    batches = [feeds(program.signature, case, vocabulary) for case in cases]
    cosines = [
        cosine(run(batch), wanted, case)
        for case, batch, wanted in zip(cases, batches, reference.run(batches), strict=True)
    ]
    together = np.concatenate(list(_flat(cosines)))
    if not np.all(np.isfinite(together)):
        hint = "the scheme overflows on this model; bf16 has the range of float32"
        raise AccuracyError("cosine to the source's outputs", float("nan"), 1.0, hint)
    return {
        "text": f"{len(cases)} batches of random tokens",
        "samples": int(together.size),
        "cosine_mean": float(f"{together.mean():.6g}"),
        "cosine_min": float(f"{together.min():.6g}"),
    }


def _flat(arrays: Sequence[npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
    for array in arrays:
        yield array.reshape(-1)


def cosine(outputs: Arrays, wanted: Arrays, case: Case) -> npt.NDArray[Any]:
    """Return the cosine of each vector of the last output, over unpadded positions."""
    name = list(wanted)[-1]
    a, b = outputs[name], wanted[name]
    if b.ndim == 3 and b.shape[1] == case.new:
        mask = case.mask() == 1
        a, b = a[mask], b[mask]
    return _cosines(a, b)


@dataclass(frozen=True)
class Similarity:
    """The similarity of output vectors to their reference's.

    Args:
        samples: Number of vectors compared.
        cosine_mean: Mean of their cosines, 1 where they agree.
        cosine_min: Lowest of their cosines.
    """

    samples: int
    cosine_mean: Estimate
    cosine_min: float


@dataclass(frozen=True)
class Evaluation:
    """An artifact against a reference.

    Args:
        text: Description of the samples that they were compared on.
        result: Measured quality or similarity.
    """

    text: str
    result: Quality | Similarity


def evaluate(candidate: Runner, reference: Results, text: str | None = None) -> Evaluation:
    """Return how far an artifact is from its reference.

    Args:
        candidate: The artifact.
        reference: Outputs of the reference, by `runner_results` or `source_results`.
        text: Text to compare on: for a language model running text, cut into windows of 256
            tokens; for another, one text per line. None for text that the artifact generates itself
            (random tokens, where it generates none).

    Raises:
        UsageError: The text is too short, or the reference is another kind of model.
    """
    require_one_model(candidate)
    language = candidate.manifest.task == "generate"
    if candidate.session.find(Role.TOKENS) is None:
        raise UsageError(
            f"{candidate.folder}: takes no tokens (task {candidate.manifest.task!r}); compare "
            "the outputs of `llmopt run --inputs` instead"
        )
    rows, label = (_language_rows if language else _other_rows)(candidate, text)
    pairs = zip(rows, runner_results(candidate)(rows), reference(rows), strict=True)
    if not language:
        return Evaluation(label, _similar(pair[1:] for pair in pairs))
    meter = QualityMeter()
    for row, outputs, wanted in pairs:
        left, right = _logits(outputs), _logits(wanted)
        if left.shape != right.shape:
            raise UsageError(
                f"the artifact's logits are {list(left.shape)}, the reference's "
                f"{list(right.shape)}: they are different models"
            )
        meter.add(right[:-1], left[:-1], row[1:])
    return Evaluation(label, meter.result())


def require_one_model(candidate: Runner) -> None:
    """Raise for an encoder-decoder model: text alone lacks its targets.

    Raises:
        UsageError: the artifact is an encoder-decoder model.
    """
    if candidate.rewriter is not None:
        raise UsageError(
            f"{candidate.folder}: an encoder-decoder model cannot be evaluated on text without its "
            "targets; `llmopt compile --quantize` prints what its quantization cost"
        )


def runner_results(runner: Runner) -> Results:
    """Return a function from rows of tokens to an artifact's outputs."""

    def results(rows: Sequence[Tokens]) -> Iterator[Arrays]:
        for row in rows:
            if runner.manifest.task == "generate":
                yield {"logits": runner.logits(row[None])}
            else:
                yield runner.run({runner.session.need(Role.TOKENS).name: row[None]})

    return results


def source_results(signature: Signature, reference: Reference) -> Results:
    """Return a function from rows of tokens to the outputs of a source of ``open_source``."""

    def results(rows: Sequence[Tokens]) -> Iterator[Arrays]:
        return reference.run([_row_feeds(signature, row) for row in rows])

    return results


def _row_feeds(signature: Signature, row: Tokens) -> Arrays:
    """Return the inputs of one full pass over ``row``, as the signature names them."""
    batch = feeds(signature, Case(1, len(row), 0, "none"), 2)
    for port in signature.inputs:
        if port.role == Role.TOKENS:
            batch[port.name] = row[None].astype(port.dtype)
        elif port.role == Role.TOKEN_TYPES:
            batch[port.name] = np.zeros((1, len(row)), port.dtype)
    return {name: array for name, array in batch.items() if not name.startswith("past_key_")}


def _logits(outputs: Arrays) -> npt.NDArray[Any]:
    """Return logits [S, V] out of a batch of one.

    Raises:
        UsageError: the outputs have no logits.
    """
    if "logits" not in outputs:
        raise UsageError(f"the reference returns {', '.join(outputs)} but no logits to compare")
    return np.asarray(outputs["logits"][0])


def _language_rows(candidate: Runner, text: str | None) -> tuple[list[Tokens], str]:
    limit = candidate.manifest.model.max_length or WINDOW
    if text is None:
        length = min(TOKENS, limit - 1)
        rows = _own_rows(candidate, length)
        return rows, f"{len(rows)} x {length} tokens written by the artifact itself"
    tokens = np.asarray(candidate.tokenizer.encode(text), np.int64)
    if len(tokens) < 2:
        raise UsageError(f"the text has {len(tokens)} tokens: too few to compare anything")
    size = min(WINDOW, limit)
    rows = [tokens[start : start + size] for start in range(0, len(tokens) - 1, size)]
    used = sum(map(len, rows[:WINDOWS]))
    return rows[:WINDOWS], f"{used} of the {len(tokens)} tokens of the text, {size} at a time"


def _own_rows(candidate: Runner, length: int) -> list[Tokens]:
    """Return rows of tokens that the artifact samples at temperature 1, seeded."""
    model = candidate.manifest.model
    start = model.bos if model.bos is not None else (*model.eos, 0)[0]
    drawn = candidate.generate_ids(
        [[start]] * ROWS, max_new_tokens=length, temperature=1.0, seed=0, stop_tokens=()
    )
    return [np.asarray([start, *row], np.int64) for row in drawn]


def _other_rows(candidate: Runner, text: str | None) -> tuple[list[Tokens], str]:
    limit = candidate.manifest.model.max_length or 64
    if text is None:
        rng = np.random.default_rng(0)
        vocabulary = candidate.manifest.model.vocabulary or 2
        lengths = [min(limit, 8 * i) for i in range(1, 9)]
        rows = [rng.integers(0, vocabulary, length) for length in lengths]
        return rows, f"{len(rows)} rows of random tokens"
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError("the text is empty: write one text per line")
    encoded, _ = candidate.tokenizer.encode_all(lines, limit)
    return [np.asarray(row, np.int64) for row in encoded], f"{len(lines)} lines of the text"


def _similar(pairs: Iterator[tuple[Arrays, Arrays]]) -> Similarity:
    """Return the cosines of the last output that both have, one for each vector."""
    cosines = []
    for outputs, wanted in pairs:
        name = next((name for name in reversed(wanted) if name in outputs), None)
        if name is None or outputs[name].shape != wanted[name].shape:
            raise UsageError(
                f"the artifact returns {_shapes(outputs)}, the reference {_shapes(wanted)}: they "
                "are different models"
            )
        cosines.append(_cosines(outputs[name], wanted[name]).reshape(-1))
    together = np.concatenate(cosines)
    count = together.size
    error = float(together.std(ddof=1) / np.sqrt(count)) if count > 1 else None
    return Similarity(count, Estimate(float(together.mean()), error), float(together.min()))


def _shapes(outputs: Arrays) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in outputs.items())


def _cosines(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[Any]:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray(np.sum(a * b, axis=-1) / np.maximum(norms, 1e-30))
