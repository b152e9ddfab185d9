"""llmopt bisect: the pass, the change, the node, and an example that shows it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from support.programs import open_session
from support.seeded import BUGS, Rounds, Seeded, decoder, encoder, source_of
from support.tiny_sources import llama_folder
from typing_extensions import override

from llmopt.cli import app
from llmopt.errors import SourceError
from llmopt.frontend.base import Source, SourceOptions
from llmopt.frontend.onnx.saved import KEY, save_program
from llmopt.frontend.source import open_source
from llmopt.ir import graph as g
from llmopt.ir.difference import Difference, difference
from llmopt.ir.fingerprints import origin
from llmopt.ir.program import Program
from llmopt.passes import PASSES
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.hits import run_hits
from llmopt.passes.pipeline import Pipeline
from llmopt.passes.remove_dead import RemoveDead
from llmopt.runtime.npz import read_npz
from llmopt.verification.bisection import GUILTY, SAME, UNTRACED, bisect
from llmopt.verification.reproducer import reduced, write_reproducer
from llmopt.verification.values import distance

PLUGIN = '''
import onnx_ir as ir
from llmopt import Outcome, Pass
from llmopt.ir import graph as g


class DropsMasks(Pass):
    """Forgets the mask of the second attention."""

    name = "drops-masks"

    def run(self, program):
        outcome = Outcome()
        for node in g.nodes(program.graph, "Attention"):
            if node.name == "l1_attention" and node.inputs[3] is not None:
                node.replace_input_with(3, None)
                outcome.hit()
        g.remove_dead(program.model)
        return outcome
'''
CHANGES = {
    "a wrong scale in attention": 2,
    "a dropped mask": 2,
    "an off-by-one in a rotary offset": 3,
    "a transposed square weight": 7,
}
FEW: Final = 12  # tokens at most: fewer cases


def changes(before: Program, after: Program) -> Difference:
    return difference(before.components, after.components, origin)


@pytest.mark.parametrize("bug", CHANGES)
def test_the_pass_the_change_and_the_node_are_named(bug: str) -> None:
    kind, item = BUGS[bug]
    assert kind == "decoder"

    found = bisect(source_of(decoder(FEW)), Pipeline((RemoveDead(), item)))

    assert found.status == GUILTY
    culprit = found.culprit
    assert culprit is not None
    assert culprit.item == item
    assert culprit.rewrite.node == item.wrong
    assert culprit.rewrite.number == CHANGES[bug]
    assert f"> [{item.wrong}]" in culprit.rewrite.text_before
    example = reduced(culprit)
    assert len(example.program.graph) < 6  # a few nodes around it, and not the model
    assert set(example.inputs) == {value.name for value in example.program.graph.inputs}


def test_nothing_is_wrong_with_the_default_passes() -> None:
    found = bisect(source_of(decoder(FEW)), Pipeline.parse("default"))

    assert found.status == SAME
    assert found.culprit is None
    assert len(found.checks) == len(found.ran) + 1


def test_a_source_that_disagrees_is_told_before_any_pass() -> None:
    other = encoder()
    g.nodes(other.graph, "Attention")[0].attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    source = Source("tiny", other, source_of(encoder()).reference)

    assert bisect(source, Pipeline.parse("default")).status == UNTRACED


@dataclass(frozen=True)
class AtOnce(Pass):
    """Counts its one change before it makes it, and makes it when it is done."""

    name: ClassVar[str] = "at-once"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        outcome.hit()
        for node in g.nodes(program.graph, "Attention"):
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
        return outcome


def test_a_change_that_is_made_last_is_found_too() -> None:
    found = bisect(source_of(encoder()), Pipeline((AtOnce(),)))

    assert found.culprit is not None
    assert found.culprit.rewrite.number == 0  # after its last change was counted
    assert found.culprit.rewrite.difference.nodes("changed") == ("l0_attention", "l1_attention")
    assert found.culprit.rewrite.node == "l0_attention"  # the first value that is off


@dataclass(frozen=True)
class Breaks(Pass):
    """Takes an operand away that MatMul cannot do without, of the second one."""

    name: ClassVar[str] = "breaks"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in g.nodes(program.graph, "MatMul"):
            if node.name == "l0_out":
                weight = ir.tensor(np.ones((3, 3), np.float32))
                node.replace_input_with(1, g.add_initializer(program.graph, "cut", weight))
            else:
                node.metadata_props["seen"] = "yes"
            outcome.hit()
        return outcome


def test_the_change_after_which_nothing_runs_is_found() -> None:
    found = bisect(source_of(encoder()), Pipeline((Breaks(),)))

    assert found.culprit is not None
    assert "cannot be run" in found.culprit.problem
    assert found.culprit.rewrite.number == 2
    assert found.culprit.rewrite.node == "l0_out"
    assert len(reduced(found.culprit).program.graph) == 1


def test_a_pass_that_rounds_wrongly_is_shown_whole(tmp_path: Path) -> None:
    found = bisect(source_of(encoder()), Pipeline((Rounds(),)))

    assert found.culprit is not None
    assert found.culprit.rewrite.number == 0
    assert found.culprit.rewrite.node == "logits"
    assert "head = float[32,11]" in found.culprit.rewrite.text_after
    command = write_reproducer(found.culprit, tmp_path / "example")
    assert "--inputs" not in command  # any inputs show it
    names = [path.name for path in (tmp_path / "example").iterdir()]
    assert sorted(names) == ["model.onnx", "model.onnx.data", "reproduce.sh"]
    assert (
        bisect(
            open_source(tmp_path / "example" / "model.onnx", SourceOptions()), Pipeline((Rounds(),))
        ).culprit
        is not None
    )


def test_a_pass_stops_after_some_of_its_changes() -> None:
    item, program = Seeded("MatMul"), encoder()

    assert run_hits(item, program.clone()) == 5
    for limit in range(6):
        part = program.clone()
        assert run_hits(item, part, limit) == limit
        assert len(changes(program, part).nodes("added")) == limit


@dataclass(frozen=True)
class Fails(Pass):
    """Raises an exception behind its first change."""

    name: ClassVar[str] = "fails"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in g.nodes(program.graph, "Add"):
            node.replace_input_with(0, node.inputs[1])
            outcome.hit()
            raise ValueError(node.name)
        return outcome


def test_a_pass_that_fails_is_left_where_it_did() -> None:
    program = encoder()

    assert run_hits(Fails(), program) == 1
    assert changes(encoder(), program).nodes("changed") == ("l0_residual",)


@dataclass(frozen=True)
class Nans(Pass):
    """Makes a weight no number."""

    name: ClassVar[str] = "nans"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        node = next(node for node in program.graph if node.name == "l1_gate")
        tensor = ir.tensor(np.full((32, 40), np.nan, np.float32))
        node.replace_input_with(1, g.add_initializer(program.graph, "nans", tensor))
        outcome.hit()
        return outcome


def test_outputs_that_are_no_numbers_are_told_as_such(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PASSES, "nans", f"{__name__}:Nans")
    line = ["bisect", sources / "decoder.onnx", "--passes", "nans", "-o", tmp_path / "out"]

    shown, told = run(*line), json.loads(run(*line, "--force", "--json").stdout)

    assert "error             not finite, allowed 0.0001" in shown.stdout
    assert told["culprit"]["error_rel"] is None
    assert told["culprit"]["node"] == "l1_gate"
    assert told["passes"][0]["before"]["error_rel"] is None


def test_a_copy_of_a_program_takes_names_for_itself_alone() -> None:
    program = encoder()
    g.taken(program.graph)

    texts = []
    for _ in range(2):
        copy = program.clone()
        run_hits(Seeded("Add"), copy)
        texts.append(changes(program, copy))

    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("found", "wanted", "error"),
    [
        ([1.0, -np.inf], [1.0, -np.inf], 0.0),
        ([1.0, 0.0], [1.0, -np.inf], np.inf),
        ([1.5, np.nan], [1.0, np.nan], 0.5),
        ([True, False], [True, True], 1.0),
        ([], [], 0.0),
        (1.5, 1.0, 0.5),
    ],
)
def test_the_distance_of_values_in_the_midst_of_a_graph(
    found: list[float] | float, wanted: list[float] | float, error: float
) -> None:
    assert distance(np.asarray(found), np.asarray(wanted)) == error


Bisect = Callable[..., Result]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved decoder and a plugin with a wrong pass."""
    folder = tmp_path_factory.mktemp("bisect")
    save_program(decoder(FEW), folder / "decoder.onnx")
    (folder / "wrong.py").write_text(PLUGIN, encoding="utf-8")
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="llmopt")


def test_the_command_shows_the_node_and_writes_an_example_that_shows_it_again(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["bisect", sources / "decoder.onnx", "--passes", "canonicalize,drops-masks"]
    line += ["--plugin", sources / "wrong.py", "-o", tmp_path / "example"]

    first = run(*line)

    assert first.exit_code == 1, first.stderr
    lines = {row.split("  ")[0]: row for row in first.stdout.splitlines() if "  " in row}
    assert "drops-masks" in lines["pass"]
    assert "l1_attention" in lines["node"]
    assert "P0 left" in lines["inputs"]
    assert "> [l1_attention] y1, present_key_1" in first.stdout
    files = sorted(path.name for path in (tmp_path / "example").iterdir())
    assert files == ["inputs.npz", "model.onnx", "model.onnx.data", "reproduce.sh", "wrong.py"]
    assert run(*line).exit_code == 2  # it is there

    script = (tmp_path / "example" / "reproduce.sh").read_text()
    words = shlex.split(script.splitlines()[1])
    monkeypatch.chdir(tmp_path / "example")
    again = run(*words[words.index("llmopt") + 1 : -1], "-o", tmp_path / "again", "--json")

    assert again.exit_code == 1, again.stderr
    told = json.loads(again.stdout)
    assert told["status"] == GUILTY
    culprit = told["culprit"]
    where = [culprit[key] for key in ("pass", "node", "case")]
    assert where == ["drops-masks", "l1_attention", "the given inputs"]
    assert culprit["error_rel"] > culprit["tolerance"]

    outputs = open_session(tmp_path / "example" / "model.onnx", read_npz(Path("inputs.npz")))
    assert all(np.isfinite(array).all() for array in outputs.values())


def test_the_command_says_plainly_that_nothing_is_wrong(sources: Path) -> None:
    result = run("bisect", sources / "decoder.onnx", "--passes", "remove-dead,merge-gate-up")

    assert result.exit_code == 0, result.stderr
    assert "No difference: " in result.stdout
    assert not list(sources.glob("*.bisect"))


def test_the_command_says_that_no_pass_is_to_blame(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = encoder()
    g.nodes(other.graph, "Attention")[0].attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    source = Source("tiny", other, source_of(encoder()).reference)
    monkeypatch.setattr("llmopt.frontend.source.open_source", lambda *_: source)

    result = run("bisect", sources / "decoder.onnx")

    assert result.exit_code == 1
    assert "before any pass" in result.stdout
    assert "No pass is to blame" in result.stdout


def test_a_saved_program_is_read_as_it_is(sources: Path) -> None:
    opened, written = open_source(sources / "decoder.onnx", SourceOptions()).program, decoder(FEW)

    assert opened.signature == written.signature
    assert opened.facts.model == written.facts.model
    assert not changes(written, opened).nodes("removed")


def test_a_saved_program_that_says_nonsense_is_refused(tmp_path: Path) -> None:
    save_program(encoder(), tmp_path / "model.onnx")
    model = ir.load(tmp_path / "model.onnx")
    model.metadata_props[KEY] = "{}"
    ir.save(model, tmp_path / "damaged.onnx")

    with pytest.raises(SourceError, match=r"the metadata 'llmopt\.program' cannot be read"):
        open_source(tmp_path / "damaged.onnx", SourceOptions())


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
            wrong = "layers.1" in node.name and scale < 0.36
            node.attributes["scale"] = ir.AttrFloat32("scale", scale * (1.05 if wrong else 1.0))
            outcome.hit()
        return outcome
"""


@pytest.mark.thorough
def test_a_wrong_rewrite_in_a_traced_model_is_found(tmp_path: Path) -> None:
    llama = llama_folder(tmp_path / "llama")
    (tmp_path / "spoils.py").write_text(SPOILS, encoding="utf-8")
    line = ["bisect", llama, "--passes", "default,spoils-scales", "--json"]
    line += ["--plugin", tmp_path / "spoils.py", "-o", tmp_path / "example"]

    told = json.loads(run(*line).stdout)

    assert told["culprit"]["pass"] == "spoils-scales"  # noqa: S105 - no password
    assert (told["culprit"]["change"], told["culprit"]["changes"]) == (2, 2)
    assert "layers.1" in told["culprit"]["node"]
    assert {each["name"] for each in told["passes"]} >= {"raise-attention", "merge-qkv"}
    errors = [each["before"]["error_rel"] for each in told["passes"][:-1] if "before" in each]
    assert max(errors) <= 1e-5
