"""Artifacts for arm64, run by arm64 programs under an emulator, against the same model on x86-64.

Emulation proves that an artifact loads there and is right, never that it is fast. The tolerance
is relative to the largest logit; where the x86 side's best token leads by more than twice the
tolerance, arm64 has to choose the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from conformance import Subject
from edge.arm64 import Arm64
from families import Model, write_random

import llmopt
from llmopt.backends import known_backends

pytestmark = pytest.mark.slow

SIZES: Final[Mapping[str, Any]] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LLAMA: Final = {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
TARGETS: Final = {"onnxruntime-arm64": "onnxruntime-cpu", "tvm-arm64": "tvm-cpu"}
"""The targets for arm64, and what runs here with kernels of the same meaning."""
FLOAT: Final = 1e-4  # sums of some hundred products in another order
INTEGER: Final = 5e-2  # activations in int8, which kernels for arm64 group in their own way
PREFILL: Final = 5


@dataclass(frozen=True)
class Case:
    """One artifact to run on both sides.

    Args:
        family: ``"llama"`` or ``"bert"``.
        scheme: None for float32.
        tolerance: ``max|a - b| / max|b|`` over real tokens.
    """

    family: str
    scheme: str | None
    tolerance: float

    @property
    def label(self) -> str:
        """What the test is called."""
        return f"{self.family}-{self.scheme or 'fp32'}"


CASES: Final = (
    Case("llama", None, FLOAT),
    Case("llama", "w8", INTEGER),
    Case("llama", "w4", INTEGER),
    Case("bert", None, FLOAT),
    Case("bert", "w8a8-dynamic", INTEGER),
)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    """A random checkpoint of each family, traced once for all of its artifacts."""
    work = tmp_path_factory.mktemp("sources")
    options: dict[str, Any] = {"llama": {**SIZES, **LLAMA}, "bert": SIZES}
    return {
        family: Subject(
            Model(
                family,
                "decoder" if family == "llama" else "encoder",
                partial(write_random, family, options[family]),
            ),
            work / family,
        )
        for family in options
    }


@pytest.fixture(scope="module", params=TARGETS)
def outputs(
    request: pytest.FixtureRequest,
    emulated: Arm64,
    subjects: dict[str, Subject],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What each case gives (there, here): one start of the emulated Python runs them all."""
    target = str(request.param)
    if target not in known_backends():
        pytest.skip(f"this llmopt has no target {target}")
    work = tmp_path_factory.mktemp(target)
    jobs, wanted = [], {}
    for case in CASES:
        place = work / case.label
        place.mkdir()
        for name, side in (("there", target), ("here", TARGETS[target])):
            subjects[case.family].compiled(side, case.scheme or "fp32", place / name)
        np.savez(place / "feeds.npz", **inputs(case.family))  # type: ignore[arg-type]  # numpy's stub
        files = {"artifact": "there", "feeds": "feeds.npz", "output": "outputs.npz"}
        prefill = PREFILL if case.family == "llama" else 0
        jobs.append({key: str(place / file) for key, file in files.items()} | {"prefill": prefill})
        wanted[case.label] = on_this_machine(place / "here", case.family)
    (work / "jobs.json").write_text(json.dumps(jobs))
    told = json.loads(emulated.run(Path(__file__).with_name("guest.py"), work / "jobs.json"))
    assert told["machine"] == "aarch64"
    return {
        label: (main_output(np.load(work / label / "outputs.npz")), here)
        for label, here in wanted.items()
    }


def inputs(family: str) -> dict[str, np.ndarray]:
    """Return three rows of nine tokens, two of them padded: on the left for a decoder."""
    ids = np.random.default_rng(1).integers(3, 128, (3, 9))
    mask = np.ones_like(ids)
    rows = mask if family == "llama" else mask[:, ::-1]
    rows[1, :1] = rows[2, :3] = 0
    feeds = {"input_ids": np.where(mask == 1, ids, 0), "attention_mask": mask}
    return feeds if family == "llama" else feeds | {"token_type_ids": np.zeros_like(ids)}


def on_this_machine(artifact: Path, family: str) -> np.ndarray:
    runner, feeds = llmopt.load(artifact, threads=1), inputs(family)
    if family == "llama":
        ids, mask = feeds["input_ids"], feeds["attention_mask"]
        return runner.logits(ids, prefill=PREFILL, mask=mask)
    return main_output(runner.run(feeds))


def main_output(found: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return logits or hidden states."""
    return np.asarray(found["logits" if "logits" in found else "last_hidden_state"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_an_artifact_computes_on_arm64_what_it_computes_here(
    outputs: dict[str, tuple[np.ndarray, np.ndarray]], case: Case
) -> None:
    there, here = outputs[case.label]
    real = inputs(case.family)["attention_mask"] == 1

    assert there.shape == here.shape
    assert there.dtype == here.dtype
    a, b = there[real], here[real]
    bound = case.tolerance * np.abs(b).max()
    assert np.abs(a - b).max() <= bound
    if case.family == "llama":
        best = np.sort(b, axis=-1)
        clear = best[:, -1] - best[:, -2] > 2 * bound
        assert clear.any()
        assert np.array_equal(a[clear].argmax(-1), b[clear].argmax(-1))
