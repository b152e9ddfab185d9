"""``llmopt.toml``: budgets of artifacts for time, memory, size and quality.

::

    [[budget]]
    artifact = "smollm2-*"            # name of its directory; * and ? are wildcards
    metric = "time_per_output_token_s"
    max = "12ms"                      # of the candidate itself; min = … for a lower limit
    max_regression = "3%"             # against the baseline; overrides --max-regression
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
"""Quality metrics for which larger is worse."""
_KEYS: Final = {"artifact", "metric", "max", "min", "max_regression"}


@dataclass(frozen=True)
class Budget:
    """Limits on a metric of some artifacts.

    Args:
        artifact: Pattern of their names; ``*`` and ``?`` are wildcards.
        metric: Metric of latency, memory, a count, or quality.
        most: Largest allowed value; None for no limit.
        least: Smallest allowed value; None for no limit.
        max_regression: Largest increase over the baseline; None for the command line's.
    """

    artifact: str
    metric: str
    most: float | None = None
    least: float | None = None
    max_regression: float | None = None

    def covers(self, name: str) -> bool:
        """Whether the budget applies to the artifact with this name."""
        return fnmatch.fnmatchcase(name, self.artifact)


def read_budgets(path: Path) -> tuple[Budget, ...]:
    """Return the budgets of a file.

    Raises:
        SourceNotFoundError: The file does not exist.
        SourceError: The file is not TOML.
        UsageError: A budget lacks a key, or an amount is malformed.
        UnknownNameError: A key or a metric is unknown.
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
    """Return the budgets that apply to an artifact."""
    return tuple(budget for budget in budgets if budget.covers(name))


def require_measured(metric: str, where: str) -> None:
    """Raise unless the metric is a measured one.

    Raises:
        UnknownNameError: The metric is not measured.
    """
    _require(metric, where, METRICS)


def require_comparable(metric: str, where: str) -> None:
    """Raise unless the metric is measured or counted.

    Raises:
        UnknownNameError: The metric is neither measured nor counted.
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
            raise UsageError(f"{where}: {key} must be a string")
    _require(data["metric"], where, (*METRICS, *COUNTED, *QUALITY))
    limits = {
        key: None if key not in data else amount(data[key], f"{where}: {key}")
        for key in ("max", "min", "max_regression")
    }
    if not any(limit is not None for limit in limits.values()):
        raise UsageError(f"{where}: no limit; give max, min or max_regression")
    if limits["min"] is not None and data["metric"] in METRICS:
        raise UsageError(f"{where}: {data['metric']} is measured and takes only max, not min")
    if limits["max"] == 0 and data["metric"] in METRICS:
        raise UsageError(f"{where}: max must be above 0")
    return Budget(
        data["artifact"], data["metric"], limits["max"], limits["min"], limits["max_regression"]
    )
