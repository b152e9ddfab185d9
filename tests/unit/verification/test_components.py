"""llmopt bisect of an encoder and a decoder: the component is named, and taken apart alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from support.seeded import Rounds, Seeded, wrong_scale
from support.tiny_encoder_decoders import tiny_folder
from support.two_components import encoder_decoder, source_of_both
from typing_extensions import override

from llmopt.cli import app
from llmopt.errors import UsageError
from llmopt.frontend.base import SourceOptions
from llmopt.frontend.source import open_source
from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes import PASSES
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.pipeline import Pipeline
from llmopt.passes.rounding import Rounding, RoundingPass
from llmopt.runtime.npz import read_npz
from llmopt.verification.bisection import GUILTY, SAME, Culprit, bisect
from llmopt.verification.reproducer import reduced, write_reproducer


def blamed(item: Pass) -> Culprit:
    found = bisect(source_of_both(encoder_decoder()), Pipeline((item,)))
    assert found.status == GUILTY
    assert found.culprit is not None
    return found.culprit


@pytest.mark.parametrize(
    ("component", "node", "change", "of"),
    [("encoder", "reads", 1, 1), ("decoder", "writes", 1, 2), ("decoder", "consults", 2, 2)],
)
def test_the_component_the_change_and_the_node_are_named(
    component: str, node: str, change: int, of: int, tmp_path: Path
) -> None:
    item = Seeded("Attention", wrong_scale, node)

    culprit = blamed(item)

    assert (culprit.component, culprit.rewrite.node) == (component, node)
    assert (culprit.rewrite.number, culprit.rewrite.of) == (change, of)
    assert f"> [{node}]" in culprit.rewrite.text_before
    assert len(reduced(culprit).program.graph) < 6  # a few nodes around it

    write_reproducer(culprit, tmp_path / "example")
    opened = open_source(tmp_path / "example" / "model.onnx", SourceOptions())
    again = bisect(opened, Pipeline((item,)), read_npz(tmp_path / "example" / "inputs.npz"))

    assert again.culprit is not None
    assert again.culprit.rewrite.node == node


def test_nothing_is_wrong_with_the_default_passes() -> None:
    found = bisect(source_of_both(encoder_decoder()), Pipeline.parse("default"))

    assert found.status == SAME


@dataclass(frozen=True)
class Breaks(Pass):
    """Takes an operand away that the last product of the decoder cannot do without."""

    name: ClassVar[str] = "breaks"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in g.nodes(program.graph, "MatMul"):
            if node.name == "l0_out":
                weight = ir.tensor(np.ones((3, 3), np.float32))
                node.replace_input_with(1, g.add_initializer(program.graph, "cut", weight))
                outcome.hit()
        return outcome


def test_the_component_after_which_nothing_runs_is_named() -> None:
    culprit = blamed(Breaks())

    assert "cannot be run" in culprit.problem
    assert (culprit.component, culprit.rewrite.node) == ("decoder", "l0_out")
    assert len(reduced(culprit).program.graph) == 1


@dataclass(frozen=True)
class RoundsHead(Rounds):
    """Makes the head 10 % larger, where there is one, and says that it does nothing."""

    name: ClassVar[str] = "rounds-head"

    @override
    def run(self, program: Program) -> Outcome:
        return super().run(program) if "head" in program.graph.initializers else Outcome()


def test_the_one_component_that_a_rounding_pass_changed_is_named(tmp_path: Path) -> None:
    culprit = blamed(RoundsHead())

    assert (culprit.component, culprit.rewrite.node) == ("decoder", "l0_out")
    assert culprit.rewrite.number == 0  # it is compared with the source alone
    write_reproducer(culprit, tmp_path / "example")
    opened = open_source(tmp_path / "example" / "model.onnx", SourceOptions())
    assert bisect(opened, Pipeline((RoundsHead(),))).culprit is not None  # through its cache


@dataclass(frozen=True)
class RoundsTables(RoundingPass):
    """Makes the table of each component 10 % larger, and says that it does nothing."""

    name: ClassVar[str] = "rounds-tables"

    @override
    def run(self, program: Program) -> Outcome:
        value = program.graph.initializers["table"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.1))
        return Outcome(applied=1)

    @override
    def rounding(self, program: Program, after: Rounding) -> Rounding:
        return after


def test_where_it_cannot_be_told_which_component_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    culprit = blamed(RoundsTables())
    assert culprit.component is None
    with pytest.raises(UsageError, match="none shows it alone"):
        write_reproducer(culprit, tmp_path / "example")

    source = source_of_both(encoder_decoder())
    monkeypatch.setattr("llmopt.frontend.source.open_source", lambda *_: source)
    monkeypatch.setitem(PASSES, "rounds-tables", f"{__name__}:RoundsTables")
    line = ["bisect", "tiny", "--passes", "rounds-tables", "-o", str(tmp_path / "example")]
    result = CliRunner().invoke(app, line)

    assert result.exit_code == 1
    assert "pass    rounds-tables" in result.stdout
    assert "unknown: the pass changed several components" in result.stdout
    assert not list(tmp_path.iterdir())


SPOILS = """
import onnx_ir as ir
from llmopt import Outcome, Pass
from llmopt.ir import graph as g


class SpoilsScales(Pass):
    name = "spoils-scales"

    def run(self, program):
        outcome = Outcome()
        for node in g.nodes(program.graph, "Attention"):
            scale = node.attributes["scale"].as_float()
            wrong = node.name.startswith("encoder.layers.1")
            node.attributes["scale"] = ir.AttrFloat32("scale", scale * (1.05 if wrong else 1.0))
            outcome.hit()
        return outcome
"""


@pytest.mark.thorough
def test_a_wrong_rewrite_in_a_traced_model_is_found(tmp_path: Path) -> None:
    bart = tiny_folder(tmp_path / "bart", "bart")
    (tmp_path / "spoils.py").write_text(SPOILS, encoding="utf-8")
    line = ["bisect", bart, "--passes", "default,spoils-scales", "--json"]
    line += ["--plugin", tmp_path / "spoils.py", "-o", tmp_path / "example"]

    told = json.loads(CliRunner().invoke(app, list(map(str, line))).stdout)

    culprit = told["culprit"]
    assert (culprit["pass"], culprit["component"]) == ("spoils-scales", "encoder")
    assert (culprit["change"], culprit["changes"]) == (2, 2)
    assert "encoder.layers.1" in culprit["node"]
    assert (tmp_path / "example" / "model.onnx").is_file()
