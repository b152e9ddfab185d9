"""The regression gate: an artifact against its baseline in speed, size and quality.

Latencies are measured interleaved, in fresh processes, and compared statistically by `decisions`;
static counts are compared exactly by `proxies`.
"""

from llmopt.benchmark.gate.budgets import Budget, read_budgets
from llmopt.benchmark.gate.checking import check, update
from llmopt.benchmark.gate.pairs import CheckRequest
from llmopt.benchmark.gate.results import CheckResult

__all__ = ["Budget", "CheckRequest", "CheckResult", "check", "read_budgets", "update"]
