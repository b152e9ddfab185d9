"""Every target that runs here computes what the source computes; the others are skipped by name.

The cases and their tolerances are those of bench/conformance.py, which makes the table of
docs/conformance.md. Here every family runs on the main targets in float32; a decoder and two
encoders on every target with every scheme. They are compiled without llmopt's own proof, which
every family passes in a test of its own.
"""

from __future__ import annotations

from pathlib import Path

import conformance
import pytest
from _pytest.mark.structures import ParameterSet
from conformance import Subject, UnusableError
from families import DECODERS, ENCODERS, MODELS, Model

import llmopt

pytestmark = pytest.mark.slow

TARGETS = conformance.targets()
EVERYWHERE = ("llama", "bert", "all-MiniLM-L6-v2")
MAIN = ("onnxruntime-cpu", "tvm-cpu")  # the others differ in providers, features or layout alone
PROMPT = (504, 3575, 282, 4649, 314, 260)
NEW = 64


def cases() -> list[ParameterSet]:
    """Return (model, target, scheme): models outermost, so that each is traced once.

    Families beside those of ``EVERYWHERE`` are proven below, on one target.
    """
    return [
        pytest.param(name, target, scheme, marks=[] if name in EVERYWHERE else pytest.mark.thorough)
        for name, model in MODELS.items()
        for target in TARGETS
        for scheme in conformance.schemes(target, model)
        if name in EVERYWHERE or (target in MAIN and wanted(model, scheme))
        if not spared(name, target, scheme)
    ]


def wanted(model: Model, scheme: str) -> bool:
    """Whether a scheme is run on a model that is not run with every one."""
    return scheme == "fp32" or (scheme == "w4" and model.layers > 2)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    """Every model, not written yet."""
    work = tmp_path_factory.mktemp("models")
    return {name: Subject(model, work / name) for name, model in MODELS.items()}


def spared(name: str, target: str, scheme: str) -> bool:
    """Whether a case is left to bench/conformance.py: TVM's bf16 is run on one model here."""
    tvm = target.startswith("tvm-cpu") and scheme == "bf16"
    return tvm and (name, target) != ("llama", "tvm-cpu")


@pytest.mark.parametrize(("name", "target", "scheme"), cases())
def test_a_target_computes_what_the_source_computes(
    subjects: dict[str, Subject], name: str, target: str, scheme: str, tmp_path: Path
) -> None:
    try:
        errors = conformance.measure(subjects[name], target, scheme, tmp_path / "artifact")
    except UnusableError as reason:
        pytest.skip(str(reason))

    assert len(errors) == 3
    assert max(errors.values()) <= conformance.tolerance(MODELS[name], scheme), errors


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_a_family_passes_the_proof_that_users_get(
    subjects: dict[str, Subject], family: str, tmp_path: Path
) -> None:
    needed = ["attention=all", "norm=all"]

    artifact = llmopt.compile(subjects[family].source, output=tmp_path / "out", require=needed)

    assert artifact.manifest.verification["status"] == "passed"
    assert artifact.manifest.verification["worst_error_rel"] <= conformance.TOLERANCES["fp32"]


def test_targets_write_the_same_tokens(subjects: dict[str, Subject], tmp_path: Path) -> None:
    subject = subjects["SmolLM2-135M-Instruct"]
    usable = [
        t for t in ("onnxruntime-cpu", "tvm-cpu") if t in TARGETS and not conformance.missing(t)
    ]
    if len(usable) < 2:
        pytest.skip("needs onnxruntime-cpu and tvm-cpu: pip install 'llmopt[cpu]'")

    written: list[list[int]] = []
    for target in usable:
        artifact = llmopt.compile(
            subject.source, target=target, verify="off", output=tmp_path / target
        )
        runner = llmopt.load(artifact)
        written.append(runner.generate_ids(PROMPT, max_new_tokens=NEW, stop_tokens=()))

    assert len(written[0]) == NEW
    assert written[0] == written[1]
