"""Exact gates on static counts, which are taken at compile time without timing anything.

A count is the same in every build; a larger one is a regression, however small, and needs no
statistics.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from llmopt.artifact.manifest import Manifest
from llmopt.benchmark.gate.budgets import LOSSES, QUALITY, Budget

OPERATORS: Final = "operators"
FUSED: Final = "fused"
_LAYER: Final = re.compile(r"(.*?\.\d+)(?:\.|\Z)")


@dataclass(frozen=True)
class ProxyChange:
    """A count of both artifacts.

    Args:
        artifact: Name of the candidate.
        metric: Name of the count: ``"weight_bytes_per_token"``, ``"operators layers.0"``.
        baseline: Count of the baseline; None if it has none.
        candidate: Count of the candidate; None if it has none.
        allowance: Largest increase over the baseline.
        detail: Location of the difference.
        falls: Whether smaller is worse.
        limited: Whether ``baseline`` is a limit from a budget, not the baseline's count.
    """

    artifact: str
    metric: str
    baseline: float | None
    candidate: float | None
    allowance: float = 0.0
    detail: str = ""
    falls: bool = False
    limited: bool = False

    @property
    def failed(self) -> bool:
        """Whether the candidate is worse by more than the allowance."""
        if self.baseline is None or self.candidate is None:
            return self.limited  # a limit on an unknown value fails
        if self.falls:
            return self.candidate < self.baseline * (1 - self.allowance)
        return self.candidate > self.baseline * (1 + self.allowance)


def totals(manifest: Manifest) -> dict[str, float]:
    """Return the total counts that an artifact records, by metric."""
    counts: dict[str, float] = {"size_bytes": sum(record.size_bytes for record in manifest.files)}
    work = manifest.work
    if not work:
        return counts
    products: Mapping[str, Any] = work.get("products", {})
    read = sum(often["weight_bytes"] for often in products.values())
    macs = {often: sum(each["macs"].values()) for often, each in products.items()}
    counts["weight_bytes_per_token"] = read + work.get("lookup_bytes", 0) + work["other_bytes"]
    counts["flops_per_token"] = 2 * sum(macs.values())
    counts["attention_flops_per_pair"] = 2 * work.get("attention_macs", 0)
    counts["cache_bytes_per_token"] = work.get("cache_bytes", 0)
    if "activation_bytes" in work:
        counts["activation_bytes"] = work["activation_bytes"]
    return counts


def quality(manifest: Manifest) -> dict[str, float]:
    """Return the quality metrics that were measured when an artifact was compiled."""
    return {
        name: float(value)
        for name, value in manifest.quality.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def compare(
    artifact: str, baseline: Manifest, candidate: Manifest, allowances: Mapping[str, float]
) -> list[ProxyChange]:
    """Return every gated count of both artifacts.

    Args:
        artifact: Name of the candidate.
        baseline: Manifest of the baseline.
        candidate: Manifest of the candidate.
        allowances: Largest increase by metric; 0 for others.
    """
    before, after = totals(baseline), totals(candidate)
    changes = [
        ProxyChange(artifact, name, before.get(name), value, allowances.get(name, 0.0))
        for name, value in after.items()
    ]
    changes += _fused(artifact, baseline, candidate)
    if baseline.work and candidate.work:
        changes += _operators(artifact, baseline, candidate, allowances.get(OPERATORS, 0.0))
    return changes


def limits(
    artifact: str, budget: Budget, baseline: Manifest, candidate: Manifest
) -> list[ProxyChange]:
    """Return the limits of a budget on counts or quality.

    Args:
        artifact: Name of the candidate.
        budget: Budget to apply; `compare` applies the increase of counts.
        baseline: Manifest that quality is compared with.
        candidate: Manifest to limit.
    """
    metric, values = budget.metric, totals(candidate) | quality(candidate)
    changes = []
    for limit, falls in ((budget.most, False), (budget.least, True)):
        if limit is not None:
            changes.append(_limit(artifact, metric, (limit, values.get(metric)), falls=falls))
    if budget.max_regression is not None and metric in QUALITY:
        before, falls = quality(baseline).get(metric), metric not in LOSSES
        allowed = budget.max_regression
        change = ProxyChange(artifact, metric, before, values.get(metric), allowed, falls=falls)
        changes.append(change)
    return changes


def _limit(
    artifact: str, metric: str, both: tuple[float, float | None], *, falls: bool
) -> ProxyChange:
    detail = "" if both[1] is not None else "not recorded in the artifact"
    return ProxyChange(artifact, metric, *both, detail=detail, falls=falls, limited=True)


def _fused(artifact: str, baseline: Manifest, candidate: Manifest) -> list[ProxyChange]:
    before: Mapping[str, Any] = baseline.compiled.get("fusion", {})
    after: Mapping[str, Any] = candidate.compiled.get("fusion", {})
    if not candidate.compiled:
        return []
    counts = {
        kind: (old["fused"], after.get(kind, {}).get("fused", 0)) for kind, old in before.items()
    }
    return [
        ProxyChange(artifact, f"{FUSED} {kind}", old, new, falls=True)
        for kind, (old, new) in counts.items()
    ]


def _operators(
    artifact: str, baseline: Manifest, candidate: Manifest, allowance: float
) -> list[ProxyChange]:
    """Return the operator counts, in total and for each layer whose operators changed."""
    before, after = _layers(baseline), _layers(candidate)
    total = _summed(before.values()), _summed(after.values())
    changes = [_change(artifact, OPERATORS, total, allowance, _kinds(*total))]
    for layer in sorted(before.keys() & after.keys(), key=_natural):
        both = _summed([before[layer]]), _summed([after[layer]])
        if both[0] != both[1]:
            where = _where(layer, before[layer], after[layer])
            changes.append(_change(artifact, f"{OPERATORS} {layer or '-'}", both, allowance, where))
    return changes


def _change(
    artifact: str,
    metric: str,
    both: tuple[Counter[str], Counter[str]],
    allowance: float,
    detail: str,
) -> ProxyChange:
    return ProxyChange(artifact, metric, both[0].total(), both[1].total(), allowance, detail)


Modules = dict[str, Counter[str]]
"""Operator counts by module of the source."""


def _layers(manifest: Manifest) -> dict[str, Modules]:
    """Return the modules of each layer: ``layers.0`` has ``layers.0.attention`` and others.

    A pass may move an operator from a module to its neighbour; a layer keeps its operators.
    """
    layers: dict[str, Modules] = {}
    for module, counts in manifest.work["operators"].items():
        layer = _LAYER.match(module)
        name = layer[1] if layer else module.partition(".")[0]
        layers.setdefault(name, {})[module] = Counter(counts)
    return layers


def _summed(layers: Iterable[Modules]) -> Counter[str]:
    total: Counter[str] = Counter()
    for modules in layers:
        for counts in modules.values():
            total += counts
    return total


def _where(layer: str, before: Modules, after: Modules) -> str:
    """Return the differences in each module of a layer."""
    parts = []
    for module in sorted(before.keys() | after.keys()):
        if kinds := _kinds(before.get(module, Counter()), after.get(module, Counter())):
            inner = module.removeprefix(layer).lstrip(".")
            parts.append(f"{inner}: {kinds}" if inner else kinds)
    return "; ".join(parts)


def _kinds(before: Counter[str], after: Counter[str]) -> str:
    """Return the operators whose count changed.

    >>> _kinds(Counter(Add=1, SkipLayerNormalization=2), Counter(Add=3))
    'SkipLayerNormalization 2 → 0, Add 1 → 3'
    """
    names = [name for name in before.keys() | after.keys() if before[name] != after[name]]
    names.sort(key=lambda name: (after[name] - before[name], name))  # decreases first
    return ", ".join(f"{name} {before[name]} → {after[name]}" for name in names)


def _natural(name: str) -> list[Any]:
    """Return a key that sorts ``layers.10`` after ``layers.9``."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in name.split(".")]
