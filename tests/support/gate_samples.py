"""Made-up measurements for the gate's tests: what processes would have measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from llmopt.benchmark.gate.rounds import BASELINE, CANDIDATE, Measured

LATENCY_S = {"ttft_s": 0.1, "time_per_output_token_s": 0.008, "load_s": 0.3}
BYTES = 2e8


def measured(
    rounds: int = 6,
    factors: Mapping[str, float] | None = None,
    noise: float = 0.01,
    sides: Sequence[str] = (BASELINE, CANDIDATE),
    seed: int = 0,
) -> list[Measured]:
    """Return what two processes of each side measured in each round.

    Args:
        rounds: How many.
        factors: By how much the candidate's metrics are larger.
        noise: Standard deviation of the logarithm of a block; processes vary a third as much.
        sides: Which there are.
        seed: Of the noise.
    """
    rng = np.random.default_rng(seed)
    found = []
    for number in range(rounds):
        for place in range(2):
            for side in sides:
                change = factors or {} if side == CANDIDATE else {}
                blocks = {
                    metric: _blocks(rng, usual * change.get(metric, 1.0), metric, noise)
                    for metric, usual in (LATENCY_S | {"peak_rss_bytes": BYTES}).items()
                }
                found.append(Measured(side, number, place, blocks))
    return found


def _blocks(
    rng: np.random.Generator, usual: float, metric: str, noise: float
) -> tuple[tuple[float, ...], ...]:
    once = metric in {"load_s", "peak_rss_bytes"}
    process = rng.normal(0, noise / 3)
    draws = rng.normal(process, noise, 1 if once else 12)
    return tuple((float(usual * np.exp(draw)),) for draw in draws)
