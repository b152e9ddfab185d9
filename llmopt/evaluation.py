"""What quantization cost, measured: an artifact and its source on the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llmopt.frontend.reference import Reference
from llmopt.ir.feeds import Arrays, Case, feeds
from llmopt.ir.program import Program, Role
from llmopt.quantization.evaluation import QualityMeter

Run = Callable[[Mapping[str, npt.NDArray[Any]]], Arrays]
ROWS: Final = 8
TOKENS: Final = 96  # 8 x 96 positions: enough for a 99th percentile


def measure_quality(program: Program, run: Run, reference: Reference) -> dict[str, Any]:
    """Return the quality of ``run`` against its source, rounded to three digits.

    For a language model: mean and 99th-percentile KL divergence and top-1 agreement on text
    that it writes itself, sampled at temperature 1 from its own start token. For any other:
    the cosine of its main output to the source's, on random tokens.
    """
    if program.facts.task == "generate" and program.signature.has_cache:
        return _language(program, run, reference)
    return _similarity(program, run, reference)


def _language(program: Program, run: Run, reference: Reference) -> dict[str, Any]:
    tokens = sample(program, run, ROWS, min(TOKENS, program.facts.max_length - 1))
    meter = QualityMeter()
    batches = [full_feeds(row[None, :-1]) for row in tokens]
    for row, batch, wanted in zip(tokens, batches, reference.run(batches), strict=True):
        found = run({**batch, **_no_past(program, 1), "logits_to_keep": np.asarray(0, np.int64)})
        meter.add(wanted["logits"][0], found["logits"][0], row[1:])
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


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def full_feeds(tokens: npt.NDArray[np.int64]) -> Arrays:
    """Return the inputs of one full pass over ``tokens`` [B, S] without padding."""
    return {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape).copy(),
    }


def _no_past(program: Program, batch: int) -> Arrays:
    sizes = {"B": batch, "P": 0}
    return {
        port.name: np.zeros([sizes.get(str(d), d) for d in port.shape], port.dtype)  # type: ignore[misc]
        for port in program.signature.inputs
        if port.role in (Role.PAST_KEY, Role.PAST_VALUE)
    }


def sample(program: Program, run: Run, rows: int, length: int) -> npt.NDArray[np.int64]:
    """Return [rows, length + 1] tokens that the artifact writes at temperature 1, seeded."""
    rng = np.random.default_rng(0)
    model = program.facts.model
    start = model.bos if model.bos is not None else (*model.eos, 0)[0]
    tokens = np.full((rows, 1), start, np.int64)
    caches = _no_past(program, rows)
    presents = [port.name for port in program.signature.outputs[1:]]
    for position in range(length):
        step = {
            "input_ids": tokens[:, -1:],
            "attention_mask": np.ones((rows, position + 1), np.int64),
            "position_ids": np.full((rows, 1), position, np.int64),
        }
        found = run({**step, **caches})
        caches = dict(zip(caches, (found[name] for name in presents), strict=True))
        scores = found["logits"][:, -1].astype(np.float64)
        noise = rng.gumbel(size=scores.shape)  # the largest of score + noise is a sample
        tokens = np.concatenate([tokens, np.argmax(scores + noise, 1)[:, None]], axis=1)
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
    return {
        "text": f"{len(cases)} batches of random tokens",
        "samples": int(together.size),
        "cosine_mean": float(f"{together.mean():.6g}"),
        "cosine_min": float(f"{together.min():.6g}"),
    }


def _flat(arrays: Sequence[npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
    for array in arrays:
        yield array.reshape(-1)


def cosine(found: Arrays, wanted: Arrays, case: Case) -> npt.NDArray[Any]:
    """Return the cosine of each vector of the last output, over unpadded positions."""
    name = list(wanted)[-1]
    a, b = found[name], wanted[name]
    if b.ndim == 3 and b.shape[1] == case.new:
        mask = case.mask() == 1
        a, b = a[mask], b[mask]
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray(np.sum(a * b, axis=-1) / np.maximum(norms, 1e-30))
