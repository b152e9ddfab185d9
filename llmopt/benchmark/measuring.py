"""Benchmarks with interleaved repetitions, so that other load slows all artifacts alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from llmopt.benchmark.machine import this_machine
from llmopt.benchmark.results import ArtifactResult, BenchmarkResult, Metric
from llmopt.benchmark.warmup import NEEDED, warmups_in
from llmopt.benchmark.workload import Encode, Generate, Inputs, Workload
from llmopt.errors import LlmoptError, UsageError
from llmopt.interface.arrays import Array
from llmopt.runtime import Runner, load
from llmopt.runtime.feeds import complete_feeds
from llmopt.runtime.generation import capacity_for
from llmopt.runtime.npz import read_npz
from llmopt.runtime.steps import Sequences

Sample = dict[str, list[float]]
"""Measurements of one repetition, by metric."""
_TRENDS: Final = frozenset(
    {"ttft_s", "time_per_output_token_s", "encode_latency_s", "run_latency_s"}
)
"""Metrics in which a warm-up is detected."""
_DEFAULT_WARMUPS: Final = 2  # with too few samples to detect the end of the warm-up

_PROBE: Final = "llmopt.benchmark.probe"


@dataclass(frozen=True)
class MeasurePlan:
    """The plan of a benchmark.

    Args:
        workload: Workload to run.
        threads: Threads inside one operator; None for all usable cores.
        repetitions: Measured runs of the workload, each with fresh tokens.
        warmups: Discarded repetitions before the measured ones; None to detect how many are slower
            than those that follow (`warmup`), or for two if there are too few to detect it.
        processes: Fresh processes that each load the artifact and run the workload once, for
            load time and peak memory.
        seed: Seed of the tokens.

    Raises:
        UsageError: A count is too small.
    """

    workload: Workload
    threads: int | None = None
    repetitions: int = 10
    warmups: int | None = None
    processes: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the counts."""
        if self.repetitions < 1 or (self.warmups or 0) < 0 or self.processes < 0:
            raise UsageError("repetitions must be at least 1, warmups and processes at least 0")

    @property
    def max_rounds(self) -> int:
        """The number of repetitions after which measuring ends, even if the warm-up has not."""
        return 2 * self.repetitions + 10


@dataclass
class Repetitions:
    """Repetitions of the workload on every artifact.

    Args:
        samples: Samples of each artifact, one per round.
        dropped: Number of leading rounds that are warm-up.
        steady: Whether the others show no trend; None if that was not tested.
    """

    samples: list[list[Sample]]
    dropped: int = 0
    steady: bool | None = None


def measure(
    artifacts: Sequence[Path], plan: MeasurePlan, progress: Callable[[str], None] = lambda _: None
) -> BenchmarkResult:
    """Return the measurements of ``plan`` on each artifact.

    Args:
        artifacts: Paths of artifacts, whose repetitions are interleaved.
        plan: Plan to follow.
        progress: Callback for the name of each stage.

    Raises:
        ArtifactError: A path is not an artifact, or the artifact is damaged.
        UsageError: There is no artifact, or one cannot run the workload.
    """
    if not artifacts:
        raise UsageError("no artifact to measure")
    load_average = _load_average()
    runners = [load(path, threads=plan.threads) for path in artifacts]
    for runner in runners:
        check_fits(runner, plan.workload)
    probes = [_probe_all(path, plan, progress) for path in artifacts]
    rounds = run_rounds(runners, plan, progress)
    results = []
    for path, runner, probe, samples in zip(
        artifacts, runners, probes, rounds.samples, strict=True
    ):
        warm = _joined({}, samples[: rounds.dropped])
        results.append(_result(path, runner, _joined(probe, samples[rounds.dropped :]), warm))
    return BenchmarkResult(
        workload=str(plan.workload),
        threads=runners[0].session.threads,
        machine=this_machine(),
        artifacts=tuple(results),
        warmups=rounds.dropped,
        steady=rounds.steady,
        load_average=load_average,
    )


def run_rounds(
    runners: Sequence[Runner], plan: MeasurePlan, progress: Callable[[str], None] = lambda _: None
) -> Repetitions:
    """Return repetitions of the workload, continued until enough follow the warm-up."""
    rounds = Repetitions([[] for _ in runners])
    fixed = plan.warmups
    if fixed is None and plan.repetitions < NEEDED:
        fixed = _DEFAULT_WARMUPS
    for number in range(plan.max_rounds if fixed is None else fixed + plan.repetitions):
        progress(_stage(number, plan, fixed))
        # Forwards and backwards alternate: no artifact always runs right after the same other.
        for index in range(len(runners))[:: 1 if number % 2 else -1]:
            random = np.random.default_rng([plan.seed, number])
            rounds.samples[index].append(run_once(runners[index], plan.workload, random))
        if fixed is None:
            warm = _warmups(rounds.samples)
            rounds.steady = warm is not None
            if warm is not None and number + 1 - warm >= plan.repetitions:
                rounds.dropped = warm
                return rounds
    rounds.dropped = len(rounds.samples[0]) - plan.repetitions
    return rounds


def _stage(number: int, plan: MeasurePlan, fixed: int | None) -> str:
    if fixed is None:
        return f"repetition {number + 1} ({plan.repetitions} needed after warm-up)"
    if number < fixed:
        return "warm-up"
    return f"repetition {number + 1 - fixed} of {plan.repetitions}"


def _warmups(samples: Sequence[Sequence[Sample]]) -> int | None:
    """Return the number of warm-up rounds over all artifacts; None if it may not have ended."""
    counts = [
        warmups_in([sample[name][0] for sample in rounds])
        for rounds in samples
        for name in rounds[0]
        if name in _TRENDS
    ]
    known = [count for count in counts if count is not None]
    return max(known) if len(known) == len(counts) else None


def _load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def check_fits(runner: Runner, workload: Workload) -> None:
    """Raise unless the artifact can run the workload.

    Raises:
        UsageError: The artifact is for another task, or its longest sequence is too short.
        SourceError: The file of inputs cannot be read.
    """
    if isinstance(workload, Inputs):
        complete_feeds(runner.session, read_npz(Path(workload.path)))
        return
    facts = runner.manifest.model
    wanted = "logits" if isinstance(workload, Generate) else "tokens"
    fitting = runner.session.find(wanted) is not None
    if isinstance(workload, Encode):
        fitting = fitting and runner.manifest.task in {"embed", "encode"}
        length = workload.length
    else:
        length = workload.prefill + workload.decode
    if not fitting:
        raise UsageError(
            f"{runner.folder}: task {runner.manifest.task!r} cannot run {workload}; use "
            "prefill=…,decode=… for task generate, encode=… for embed and encode, FILE.npz for any"
        )
    if facts.max_length and length > facts.max_length:
        raise UsageError(
            f"{runner.folder}: takes at most {facts.max_length} tokens; {workload} needs {length}"
        )


def run_once(runner: Runner, workload: Workload, random: np.random.Generator) -> Sample:
    """Return the measurements of one repetition with tokens from ``random``."""
    if isinstance(workload, Inputs):
        return _run_inputs(runner, workload)
    if isinstance(workload, Encode):
        return _encode_once(runner, workload, random)
    return _generate_once(runner, workload, random)


def _generate_once(runner: Runner, workload: Generate, random: np.random.Generator) -> Sample:
    batch, total = workload.batch, workload.prefill + workload.decode
    tokens = random_tokens(runner, (batch, workload.prefill), random)
    capacity = capacity_for(total, runner.manifest.model.max_length)
    start = time.perf_counter()
    sequences = Sequences(runner.session, batch, capacity)
    chosen = sequences.extend(tokens)[:, -1].argmax(axis=-1)
    first = time.perf_counter()
    steps = []
    for _ in range(workload.decode - 1):
        before = time.perf_counter()
        chosen = sequences.extend(chosen[:, None])[:, -1].argmax(axis=-1)
        steps.append(time.perf_counter() - before)
    sample = {
        "ttft_s": [first - start],
        "prefill_tokens_per_s": [batch * workload.prefill / (first - start)],
    }
    if steps:
        sample["time_per_output_token_s"] = [sum(steps) / len(steps)]
        sample["decode_tokens_per_s"] = [batch * len(steps) / sum(steps)]
        sample["token_latency_s"] = steps
    return sample


def _encode_once(runner: Runner, workload: Encode, random: np.random.Generator) -> Sample:
    tokens_port = runner.session.need("tokens")
    tokens = random_tokens(runner, (workload.batch, workload.length), random)
    feeds = {tokens_port.name: tokens.astype(tokens_port.dtype)}
    start = time.perf_counter()
    runner.run(feeds)
    duration = time.perf_counter() - start
    return {
        "encode_latency_s": [duration],
        "encode_tokens_per_s": [workload.batch * workload.length / duration],
    }


def _run_inputs(runner: Runner, workload: Inputs) -> Sample:
    feeds = read_npz(Path(workload.path))
    start = time.perf_counter()
    runner.run(feeds)
    return {"run_latency_s": [time.perf_counter() - start]}


def random_tokens(runner: Runner, shape: tuple[int, int], random: np.random.Generator) -> Array:
    """Return random tokens, none of them a special token of the model."""
    facts = runner.manifest.model
    special = {facts.bos, facts.pad, *facts.eos}
    valid = [token for token in range(max(facts.vocabulary, 1)) if token not in special]
    return random.choice(np.array(valid or [0], np.int64), shape)


def _probe_all(path: Path, plan: MeasurePlan, progress: Callable[[str], None]) -> Sample:
    samples: Sample = {}
    for number in range(plan.processes):
        progress(f"loading {path} in a fresh process, {number + 1} of {plan.processes}")
        _extend(samples, _probe(path, plan))
    return samples


def _probe(path: Path, plan: MeasurePlan) -> Sample:
    """Return the load time and peak memory of a fresh process that runs the workload once."""
    request = {"artifact": str(path), "workload": str(plan.workload), "threads": plan.threads}
    command = [sys.executable, "-m", _PROBE, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LlmoptError(f"{path}: a fresh process could not run {plan.workload}: {last}")
    metrics: dict[str, float] = json.loads(done.stdout)
    return {name: [value] for name, value in metrics.items()}


def _extend(samples: Sample, more: Sample) -> None:
    for name, values in more.items():
        samples.setdefault(name, []).extend(values)


def _joined(first: Sample, others: Sequence[Sample]) -> Sample:
    samples = {name: list(values) for name, values in first.items()}
    for more in others:
        _extend(samples, more)
    return samples


def _result(path: Path, runner: Runner, samples: Sample, warm: Sample) -> ArtifactResult:
    manifest = runner.manifest
    return ArtifactResult(
        path=str(path),
        target=manifest.target,
        size_bytes=sum(record.size_bytes for record in manifest.files),
        metrics=tuple(Metric(name, tuple(values)) for name, values in samples.items()),
        warmup={name: tuple(values) for name, values in warm.items()},
        precision=str(manifest.precision.get("weights", "fp32")),
        compiled=manifest.compiled,
    )
