"""``llmopt.toml``: what each artifact may take, in time, memory, size and quality.

::

    [[budget]]
    artifact = "smollm2-*"            # the name of its directory, * and ? stand for others
    metric = "time_per_output_token_s"
    max = "12ms"                      # of the candidate itself; least = … for what may not fall
    max_regression = "3%"             # against the baseline, instead of --max-regression
"""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llmopt.benchmark.gate.amounts import amount
from llmopt.benchmark.gate.rounds import METRICS
from llmopt.errors import SourceError, SourceNotFoundError, UnknownNameError, UsageError

COUNTED: Final = (
    "size_bytes",
    "operators",
    "weight_bytes_per_token",
    "flops_per_token",
    "attention_flops_per_pair",
    "cache_bytes_per_token",
    "activation_bytes",
)
QUALITY: Final = ("kl_mean", "kl_p99", "top1", "cosine_mean", "cosine_min")
LOSSES: Final = frozenset({"kl_mean", "kl_p99"})
"""Of quality, what is worse the larger it is."""
_KEYS: Final = {"artifact", "metric", "max", "min", "max_regression"}


@dataclass(frozen=True)
class Budget:
    """What a metric of some artifacts may come to.

    Args:
        artifact: Their names; ``*`` and ``?`` stand for others.
        metric: Measured, counted, or of quality.
        most: The largest value; None for any.
        least: The smallest; None for any.
        max_regression: How much larger than the baseline; None for what the command line says.
    """

    artifact: str
    metric: str
    most: float | None = None
    least: float | None = None
    max_regression: float | None = None

    def covers(self, name: str) -> bool:
        """Whether it is about the artifact of this name."""
        return fnmatch.fnmatchcase(name, self.artifact)


def read_budgets(path: Path) -> tuple[Budget, ...]:
    """Return the budgets of a file.

    Raises:
        SourceNotFoundError: There is no such file.
        SourceError: It is not TOML.
        UsageError: A budget lacks a key, has one that is unknown, or no amount.
        UnknownNameError: There is no such metric.
    """
    hint = "write [[budget]] with artifact, metric, max and max_regression"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceNotFoundError(path, hint) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SourceError(path, f"cannot be read ({error})", hint) from error
    tables = data.get("budget", [])
    if not isinstance(tables, list) or not all(isinstance(each, dict) for each in tables):
        raise UsageError(f"{path}: {hint}")
    return tuple(_budget(f"{path}: budget {n + 1}", each) for n, each in enumerate(tables))


def budgets_for(budgets: Sequence[Budget], name: str) -> tuple[Budget, ...]:
    """Return those that are about an artifact."""
    return tuple(budget for budget in budgets if budget.covers(name))


def require_measured(metric: str, where: str) -> None:
    """Raise unless the metric is one that is measured.

    Raises:
        UnknownNameError: It is none.
    """
    _require(metric, where, METRICS)


def require_comparable(metric: str, where: str) -> None:
    """Raise unless the metric is measured or counted.

    Raises:
        UnknownNameError: It is neither.
    """
    _require(metric, where, (*METRICS, *COUNTED))


def _require(metric: str, where: str, known: Sequence[str]) -> None:
    if metric not in known:
        raise UnknownNameError(f"metric of {where}", metric, known)


def _budget(where: str, data: dict[str, Any]) -> Budget:
    if unknown := data.keys() - _KEYS:
        raise UnknownNameError(f"key of {where}", min(unknown), _KEYS)
    for key in ("artifact", "metric"):
        if not isinstance(data.get(key), str):
            raise UsageError(f"{where}: {key} should be a string")
    _require(data["metric"], where, (*METRICS, *COUNTED, *QUALITY))
    limits = {
        key: None if key not in data else amount(data[key], f"{where}: {key}")
        for key in ("max", "min", "max_regression")
    }
    if not any(limit is not None for limit in limits.values()):
        raise UsageError(f"{where}: it limits nothing; give max, min or max_regression")
    if limits["min"] is not None and data["metric"] in METRICS:
        raise UsageError(f"{where}: {data['metric']} is measured, and may be limited by max alone")
    if limits["max"] == 0 and data["metric"] in METRICS:
        raise UsageError(f"{where}: max has to be more than 0")
    return Budget(
        data["artifact"], data["metric"], limits["max"], limits["min"], limits["max_regression"]
    )
