"""After each pass the Program is compared: what a pass must not change, and what it may."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from support.seeded import BUGS, Rounds, Seeded, decoder, encoder, source_of
from typing_extensions import override

import llmopt
from llmopt.cli.summary import checks_table, summary
from llmopt.compiler import CompileOptions, compile_source
from llmopt.errors import AccuracyError, PassError, UsageError
from llmopt.frontend.base import SourceOptions
from llmopt.frontend.onnx.saved import save_program
from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.convert_float import ConvertFloat
from llmopt.passes.pipeline import Pipeline, Ran
from llmopt.passes.quantize_weights import QuantizeWeights
from llmopt.quantization.schemes import parse_scheme
from llmopt.verification.checks import BEFORE, ELSEWHERE, SOURCE
from llmopt.verification.each import Watch
from llmopt.verification.trials import trial_of, trials


@pytest.fixture(scope="module")
def programs() -> dict[str, tuple[Program, Watch]]:
    """A decoder and an encoder that were compared with their sources."""
    found = {}
    for kind, made in (("decoder", decoder()), ("encoder", encoder())):
        watch = Watch.started(source_of(made).reference, made)
        watch.checks[0].require()
        found[kind] = made, watch
    return found


@pytest.mark.parametrize("bug", BUGS)
def test_a_pass_that_is_wrong_on_purpose_is_caught(
    bug: str, programs: dict[str, tuple[Program, Watch]]
) -> None:
    kind, item = BUGS[bug]
    program, watch = programs[kind]

    with pytest.raises(AccuracyError, match=r"pass 'seeded' changed what the Program computes"):
        Pipeline((item,)).run(program.clone(), watch.forked())


@pytest.mark.parametrize("bug", BUGS)
def test_the_same_pass_without_the_bug_passes(
    bug: str, programs: dict[str, tuple[Program, Watch]]
) -> None:
    kind, item = BUGS[bug]
    program, watch = programs[kind][0], programs[kind][1].forked()

    Pipeline((type(item)(item.op_type),)).run(program.clone(), watch)

    step = watch.checks[-1].worst(BEFORE)
    assert step is not None
    assert step.compared.error_rel <= 1e-6


def test_the_matrix_has_every_size_padding_and_past(
    programs: dict[str, tuple[Program, Watch]],
) -> None:
    labels = {trial.label for trial in trials(programs["decoder"][0])}

    assert labels >= {
        *("B1 S1 P0 none", "B1 S7 P0 none", "B1 S33 P0 none", "B1 S33 P5 none"),
        *(f"B3 S{n} P{past} {pad}" for n in (7, 33) for past in (0, 5) for pad in _PADDINGS),
    }
    assert not any("P5" in trial.label for trial in trials(programs["encoder"][0]))
    assert "B1 S33 P0 none" not in {t.label for t in trials(_short(programs["encoder"][0], 32))}


_PADDINGS = ("none", "left", "right")


def _short(program: Program, limit: int) -> Program:
    made = program.clone()
    made.learn(model=replace(made.facts.model, max_length=limit))
    return made


def test_a_pass_that_changes_nothing_costs_no_run(
    programs: dict[str, tuple[Program, Watch]],
) -> None:
    program, watch = programs["decoder"][0].clone(), programs["decoder"][1].forked()

    Pipeline.parse("remove-dead").run(program, watch)

    assert watch.checks[-1].findings == ()
    assert watch.checks[-1].summary() == {"check_s": 0.0, "note": "it changed nothing"}


@pytest.mark.parametrize("item", [QuantizeWeights(bits=8, block=16), ConvertFloat("float16")])
def test_a_pass_that_says_what_it_rounds_is_compared_with_a_source_rounded_alike(
    item: Pass, programs: dict[str, tuple[Program, Watch]]
) -> None:
    program, watch = programs["decoder"][0].clone(), programs["decoder"][1].forked()

    Pipeline((item, Seeded("Add"))).run(program, watch)

    rounded, after = watch.checks[-2:]
    assert rounded.worst(BEFORE) is None
    assert rounded.worst(SOURCE) is not None
    assert after.worst(BEFORE) is not None
    assert any("P4" in each.compared.label for each in rounded.findings)  # through its caches


def test_a_pass_that_rounds_otherwise_than_it_says_is_caught(
    programs: dict[str, tuple[Program, Watch]],
) -> None:
    program, watch = programs["encoder"]

    with pytest.raises(AccuracyError, match=r"pass 'rounds'.*against the source: 0\.1"):
        Pipeline((Rounds(),)).run(program.clone(), watch.forked())


@dataclass(frozen=True)
class Mismatches(Pass):
    """Cuts a weight, so that shapes no longer go together."""

    name: ClassVar[str] = "mismatches"

    @override
    def run(self, program: Program) -> Outcome:
        weight = g.add_initializer(program.graph, "cut", ir.tensor(np.ones((3, 3), np.float32)))
        g.nodes(program.graph, "MatMul")[-1].replace_input_with(1, weight)
        return Outcome(applied=1)


def test_a_program_that_cannot_be_run_is_the_fault_of_the_pass(
    programs: dict[str, tuple[Program, Watch]],
) -> None:
    program, watch = programs["encoder"]

    with pytest.raises(PassError, match=r"'mismatches' left.*it cannot be run"):
        Pipeline((Mismatches(),)).run(program.clone(), watch.forked())


def test_a_source_that_disagrees_before_any_pass_is_told_apart() -> None:
    source, other = source_of(encoder()), encoder()
    Rounds().run(other)

    with pytest.raises(AccuracyError, match="before any pass, the traced Program is not"):
        Watch.started(source.reference, other).checks[0].require()


def test_inputs_that_are_given_take_the_place_of_the_matrix() -> None:
    made = decoder()
    trial = next(t for t in trials(made) if t.label == "B3 S7 P5 left")
    asked = trial_of(made, trial.feeds)

    watch = Watch.started(source_of(made).reference, made, [asked])
    assert watch.checks[0].findings == ()  # the source takes no cache
    with pytest.raises(AccuracyError, match="at the given inputs"):
        Pipeline((BUGS["a wrong scale in attention"][1],)).run(made, watch)

    assert asked.past == 5
    assert asked.tokens is not None
    assert asked.tokens.new == 7
    assert [each.compared.label for each in watch.checks[-1].wrong] == ["the given inputs"]


def test_compile_checks_each_pass_and_tells_how_far_it_moved(tmp_path: Path) -> None:
    save_program(decoder(12), tmp_path / "decoder.onnx")
    options = CompileOptions(quantize=parse_scheme("w8{block=16}"), verify="each")

    (artifact,) = compile_source(
        tmp_path / "decoder.onnx", ["cpu"], tmp_path / "out", options, SourceOptions()
    )

    names = [check.name for check in artifact.checks]
    assert names == ["trace", *(ran.name for ran in artifact.passes)]
    assert artifact.manifest.verification["status"] == "passed"
    shown: dict[str, Any] = artifact.summary()
    assert shown["traced"]["source"]["error_rel"] <= 1e-5
    checks = {each["name"]: each["verification"] for each in shown["passes"]}
    assert checks["quantize-weights"]["source"]["error_rel"] <= 1e-5
    assert "error vs before" in summary(artifact)
    lowered = {check.name: check for check in artifact.checks}["lower-weights"]
    assert lowered.worst(SOURCE) is not None  # onnxruntime runs what is lowered in part


@dataclass(frozen=True)
class Lowers(Pass):
    """Leaves an operator of a vendor."""

    name: ClassVar[str] = "lowers"
    lowers: ClassVar[bool] = True

    @override
    def run(self, program: Program) -> Outcome:
        g.nodes(program.graph, "MatMul")[0].domain = "com.vendor"
        return Outcome(applied=1)


def test_what_only_the_artifact_can_show_is_left_to_it(
    programs: dict[str, tuple[Program, Watch]],
) -> None:
    program, watch = programs["encoder"][0].clone(), programs["encoder"][1].forked()
    ran: list[Ran] = []

    def after(item: Pass, edited: Program, done: Ran) -> None:
        ran.append(done)
        watch(item, edited, done)

    Pipeline((Lowers(),)).run(program, after)

    assert watch.checks[-1].note == ELSEWHERE
    assert watch.checks[-1].findings == ()
    shown = checks_table(watch.checks, ran).splitlines()
    assert shown[2].split()[-3:-1] == ["-", "-"]
    assert shown[-1] == f"-: {ELSEWHERE}"


def test_another_way_to_verify_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose one of each, final, off"):
        llmopt.compile(tmp_path, verify="often")
