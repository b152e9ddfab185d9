"""The self-test: an artifact shows on this machine that it computes what it was built to compute.

Its files are compared with their digests, its tokenizer and its outputs with the example that it
carries (`llmopt.runtime.golden`). Load time, memory and speed are measured on the way.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np

from llmopt.artifact.manifest import Manifest
from llmopt.errors import ArtifactError, LlmoptError, UsageError
from llmopt.interface.arrays import Array
from llmopt.interface.signature import Role
from llmopt.interface.stepping import Sequences
from llmopt.runtime.cores import usable_cores
from llmopt.runtime.generation import capacity_for
from llmopt.runtime.golden import FOLDER, Golden, kept
from llmopt.runtime.memory import peak_bytes
from llmopt.runtime.runner import Runner

SCHEMA: Final = 1
_PACKAGES: Final = ("onnxruntime", "apache-tvm", "numpy", "tokenizers")
_PROMPT: Final = 32
_STEPS: Final = 16
_SPEED_S: Final = 2.0
_REPEATS: Final = 3


@dataclass(frozen=True)
class Check:
    """One thing that was compared.

    Args:
        name: ``"files"``, ``"tokenizer"``, ``"logits"``, ``"best token"``, or an output's name.
        passed: Whether it was as it has to be.
        compared: Number of files, tokens, elements or positions compared.
        error_rel: ``max|a - b| / max|b|``; None where that means nothing.
        tolerance: Largest error allowed.
    """

    name: str
    passed: bool
    compared: int
    error_rel: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """What a self-test found.

    Args:
        artifact: Path of the artifact.
        target: Target of the artifact.
        checks: Results of each comparison.
        load_s: Seconds to open it, libraries included.
        speed: By name, units in the names.
        peak_memory_bytes: Most memory resident at once; None where the system does not say.
    """

    artifact: str
    target: str
    checks: tuple[Check, ...]
    load_s: float
    speed: Mapping[str, float]
    peak_memory_bytes: int | None

    @property
    def passed(self) -> bool:
        """Whether all was as it has to be."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return all of it, and what the machine is."""
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            "error": None,
            **asdict(self),
            "machine": _machine(),
        }

    def __str__(self) -> str:
        """Return it as lines for people."""
        return "\n".join(_lines(self))


def failure(artifact: Path, error: LlmoptError) -> dict[str, Any]:
    """Return what is written where the self-test could not be carried out."""
    return {
        "schema": SCHEMA,
        "passed": False,
        "error": str(error),
        "artifact": str(artifact),
        "machine": _machine(),
    }


def selftest(artifact: Path, threads: int | None = None) -> SelfTest:
    """Return what the self-test of an artifact found; a device that is off is no exception.

    Args:
        artifact: Directory of the artifact.
        threads: Threads inside one operator; None for as many as the process may use.

    Raises:
        ArtifactError: It is damaged, or carries no example that fits it.
        BackendUnavailableError: What it needs is not here.
    """
    manifest = Manifest.read(artifact)
    manifest.verify_files(artifact)
    golden = Golden.read(artifact)
    if golden is None:
        raise ArtifactError(artifact, _without_example(manifest))
    start = time.perf_counter()
    runner = Runner(artifact, threads)
    load_s = time.perf_counter() - start
    files = Check("files", passed=True, compared=len(manifest.files))
    try:
        checks = (files, *compare(runner, golden))
    except (KeyError, ValueError, IndexError, UsageError) as error:
        problem = f"its example does not fit the model ({error})"
        raise ArtifactError(artifact / FOLDER, problem) from error
    return SelfTest(
        artifact=str(artifact),
        target=manifest.target,
        checks=checks,
        load_s=load_s,
        speed=_speed(runner, golden),
        peak_memory_bytes=peak_bytes(),
    )


def _without_example(manifest: Manifest) -> str:
    if manifest.target.startswith("tensorrt"):
        return (
            "it carries no example, because no engine ran where it was compiled; one that is "
            "built on the device is compared there"
        )
    return (
        f"it carries no example to test itself with ({FOLDER}/): it was compiled with "
        "--verify off, or by an older llmopt"
    )


def compare(runner: Runner, golden: Golden) -> Iterator[Check]:
    """Yield what comes of comparing an open artifact with its example."""
    if golden.text:
        found = runner.tokenizer.encode(golden.text)
        same = tuple(found) == golden.tokens
        yield Check("tokenizer", passed=same, compared=len(golden.tokens))
    yield from _logits(runner, golden) if golden.prefill else _outputs(runner, golden)


def _logits(runner: Runner, golden: Golden) -> Iterator[Check]:
    """Compare teacher-forced logits, and the best token wherever it leads clearly."""
    ids, mask = golden.inputs["input_ids"], golden.inputs["attention_mask"]
    columns, wanted = golden.outputs["columns"], golden.outputs["logits"]
    given = mask if runner.session.find(Role.MASK) is not None else None
    images = golden.inputs.get("pixel_values")
    source = _source(golden)
    logits = runner.logits(ids, golden.prefill, mask=given, source=source, images=images)
    real, bound = mask == 1, golden.tolerance * golden.scales["logits"]
    found = np.take_along_axis(logits, columns.astype(np.int64), axis=-1)
    yield _counted("logits", found[real], wanted[real], golden)
    clear = real & (wanted[..., 0] - wanted[..., 1] > 2 * bound)
    same = logits.argmax(axis=-1)[clear] == columns[..., 0][clear]
    yield Check("best token", passed=bool(same.all()), compared=int(clear.sum()))


def _source(golden: Golden) -> dict[str, Array] | None:
    """Return what is read first; None for a model that reads nothing beside its own text."""
    start = "encoder."
    found = {n.removeprefix(start): a for n, a in golden.inputs.items() if n.startswith(start)}
    return found or None


def _counted(name: str, outputs: Array, wanted: Array, golden: Golden) -> Check:
    """Compare logits [tokens, C], the tokens that are furthest off left out as far as allowed."""
    left_out = int(len(wanted) * (1 - golden.counted))
    order = np.argsort(np.abs(outputs - wanted).max(axis=-1))  # what is not a number comes last
    kept_rows = order[: len(wanted) - left_out] if np.isfinite(outputs).all() else slice(None)
    return _within(name, outputs[kept_rows], wanted[kept_rows], golden)


def _outputs(runner: Runner, golden: Golden) -> Iterator[Check]:
    found = runner.session.run(golden.inputs, list(golden.outputs))
    port = runner.session.find(Role.MASK)
    mask = golden.inputs.get(port.name) if port is not None else None
    for name, wanted in golden.outputs.items():
        yield _within(name, kept(found[name], mask), wanted, golden)


def _within(name: str, outputs: Array, wanted: Array, golden: Golden) -> Check:
    scale = golden.scales[name] or 1.0
    finite = outputs.shape == wanted.shape and bool(np.isfinite(outputs).all())
    error = float(np.abs(outputs - wanted).max()) / scale if finite else float("inf")
    passed = error <= golden.tolerance
    return Check(name, passed, wanted.size, error if finite else None, golden.tolerance)


def _speed(runner: Runner, golden: Golden) -> dict[str, float]:
    """Return the best speed of a few short runs, for a first impression; `bench` measures."""
    best: dict[str, float] = {}
    stop = time.perf_counter() + _SPEED_S
    for _ in range(_REPEATS):
        found = _decoding(runner, golden) if golden.prefill else _running(runner, golden)
        best = {name: max(value, best.get(name, 0.0)) for name, value in found.items()}
        if time.perf_counter() > stop:
            break
    return best


def _decoding(runner: Runner, golden: Golden) -> dict[str, float]:
    """Return the speed of a prompt and of steps after it, of fewer tokens on a slow device."""
    facts = runner.manifest.model
    longest = facts.max_length or _PROMPT + _STEPS
    source = _source(golden)
    read = {}
    if source is not None and runner.rewriter is not None:
        read = runner.rewriter.reader.read({name: array[:1] for name, array in source.items()})
    one_s = _timed(runner, read, 1, 1)[1]
    affordable = max(1, int(_SPEED_S / one_s / 4))
    steps = max(1, min(_STEPS, longest // 2, affordable))
    prompt = max(1, min(_PROMPT, longest - steps, affordable))
    first_s, rest_s = _timed(runner, read, prompt, steps)
    return {"prefill_tokens_per_s": prompt / first_s, "decode_tokens_per_s": steps / rest_s}


def _timed(
    runner: Runner, read: Mapping[str, Array], prompt: int, steps: int
) -> tuple[float, float]:
    """Return seconds of a prompt, and of the steps after it."""
    facts = runner.manifest.model
    ids = np.arange(prompt)[None] % max(facts.vocabulary, 1)
    room = capacity_for(prompt + steps, facts.max_length)
    sequences = Sequences(runner.session, 1, room, read)
    start = time.perf_counter()
    logits = sequences.extend(ids)
    first = time.perf_counter()
    for _ in range(steps):
        logits = sequences.extend(logits[:, -1].argmax(axis=-1)[:, None])
    return first - start, time.perf_counter() - first


def _running(runner: Runner, golden: Golden) -> dict[str, float]:
    start = time.perf_counter()
    runner.session.run(golden.inputs, list(golden.outputs))
    return {"runs_per_s": 1 / (time.perf_counter() - start)}


def _machine() -> dict[str, Any]:
    """Return what this machine is, and the versions of what runs artifacts."""
    found: dict[str, Any] = {
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": usable_cores(),
        "python": platform.python_version(),
    }
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _lines(result: SelfTest) -> Iterator[str]:
    for check in result.checks:
        said = "ok  " if check.passed else "FAIL"
        error = "not comparable" if check.error_rel is None else f"error {check.error_rel:.2g}"
        bound = "" if check.tolerance is None else f", {error}, allowed {check.tolerance:.2g}"
        yield f"{said}  {check.name}: {check.compared} compared{bound}"
    measured = [f"loaded in {result.load_s:.2f} s"]
    if result.peak_memory_bytes is not None:
        measured.append(f"{result.peak_memory_bytes / 1e6:.0f} MB at most")
    yield ", ".join(measured)
    yield ", ".join(f"{x:.3g} {name.replace('_per_s', '/s')}" for name, x in result.speed.items())
    yield f"self-test of {result.artifact}: {'passed' if result.passed else 'FAILED'}"
