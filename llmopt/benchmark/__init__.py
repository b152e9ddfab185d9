"""Benchmarks of artifacts: load time, TTFT, time per output token, encoding, memory.

>>> from llmopt.benchmark import parse_workload
>>> parse_workload("prefill=128,decode=64")
Generate(prefill=128, decode=64, batch=1)
"""

from llmopt.benchmark.explaining import explain
from llmopt.benchmark.measuring import MeasurePlan, measure
from llmopt.benchmark.results import ArtifactResult, BenchmarkResult, Metric
from llmopt.benchmark.workload import (
    Encode,
    Generate,
    Inputs,
    Workload,
    default_workload,
    parse_workload,
)

__all__ = [
    "ArtifactResult",
    "BenchmarkResult",
    "Encode",
    "Generate",
    "Inputs",
    "MeasurePlan",
    "Metric",
    "Workload",
    "default_workload",
    "explain",
    "measure",
    "parse_workload",
]
