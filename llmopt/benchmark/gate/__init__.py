"""The gate: whether an artifact became slower, larger or worse than its baseline.

Times are measured in turns, in fresh processes, and compared by `decisions`; what can be counted
is counted, by `proxies`, and compared exactly.
"""

from llmopt.benchmark.gate.budgets import Budget, read_budgets
from llmopt.benchmark.gate.checking import check, update
from llmopt.benchmark.gate.pairs import CheckRequest
from llmopt.benchmark.gate.results import CheckResult

__all__ = ["Budget", "CheckRequest", "CheckResult", "check", "read_budgets", "update"]
