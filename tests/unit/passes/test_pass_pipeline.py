"""A pipeline is text: it parses, prints, refuses what it does not know, and checks each pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import pytest
from support.programs import operators, program
from typing_extensions import override

from llmopt.errors import PassError, UnknownNameError, UsageError
from llmopt.ir.program import Program
from llmopt.passes import DEFAULT, PASSES, known_passes
from llmopt.passes.base import Miss, Outcome, Pass
from llmopt.passes.pipeline import Pipeline, Ran
from llmopt.spelling import spell

TEXT = "main (float[B,4] x) => (float[B,4] y) { a = Identity (x)\n b = Abs (a)\n y = Relu (a) }"


@dataclass(frozen=True)
class Tunable(Pass):
    """A pass with an option of each kind."""

    name: ClassVar[str] = "tunable"
    count: int = 3
    factor: float = 0.5
    label: str = "a"
    loud: bool = False

    @override
    def run(self, program: Program) -> Outcome:
        return Outcome()


KNOWN: dict[str, type[Pass]] = {**known_passes(), "tunable": Tunable}


def test_default_stands_for_the_default_passes() -> None:
    assert [item.name for item in Pipeline.parse("default").passes] == list(DEFAULT)
    assert str(Pipeline.parse(" default ")) == ",".join(DEFAULT)
    assert Pipeline.parse("").passes == ()
    assert {*DEFAULT} <= {*PASSES}


def test_every_pass_is_named_as_the_table_says_and_describes_itself() -> None:
    for name, cls in known_passes().items():
        assert cls.name == name
        assert "Numerics:" in (cls.__doc__ or "")
        assert "Scope:" in (cls.__doc__ or "")


def test_a_pass_is_taken_away_and_one_added() -> None:
    names = str(Pipeline.parse("default,-merge-qkv,remove-dead")).split(",")

    assert "merge-qkv" not in names
    assert names[-1] == "remove-dead"
    assert str(Pipeline.parse("default", default=("canonicalize",))) == "canonicalize"


@pytest.mark.parametrize(
    "text",
    ["tunable", "tunable{count=4}", "tunable{count=-1,factor=2.5}", "tunable{label=b,loud=true}"],
)
def test_text_parses_to_what_prints_as_it(text: str) -> None:
    pipeline = Pipeline.parse(f"{text},remove-dead", known=KNOWN)

    assert str(pipeline) == f"{text},remove-dead"
    assert spell(pipeline.passes[0]) == text


def test_options_have_the_types_of_their_fields() -> None:
    (item,) = Pipeline.parse("tunable{ count=7, factor=1e-3 ,loud=1}", known=KNOWN).passes

    assert item == Tunable(count=7, factor=1e-3, loud=True)


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("fuse-norm", UnknownNameError, "fuse-norms"),
        ("default,-fuse-norm", UnknownNameError, "fuse-norm"),
        ("tunable{counts=4}", UnknownNameError, "count"),
        ("tunable{count=many}", UsageError, "expected int"),
        ("tunable{loud=maybe}", UsageError, "expected true or false"),
        ("tunable{count}", UsageError, "has no value"),
        ("tunable{count=1,count=2}", UsageError, "given twice"),
        ("tunable{count=4", UsageError, "is not a pass"),
        ("fuse norms", UsageError, "is not a pass"),
        ("remove-dead{all=1}", UnknownNameError, "all"),
    ],
)
def test_what_is_not_known_is_refused(text: str, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        Pipeline.parse(text, known=KNOWN)


def test_each_pass_is_told_after_it_ran() -> None:
    told: list[tuple[str, int, list[str]]] = []

    def after(item: Pass, of: Program, ran: Ran) -> None:
        assert item.name == ran.name
        assert ran.duration_s >= 0
        told.append((ran.name, ran.applied, operators(of)))

    Pipeline.parse("canonicalize,remove-dead").run(program(TEXT), after)

    assert told == [("canonicalize", 1, ["Relu"]), ("remove-dead", 0, ["Relu"])]


@dataclass(frozen=True)
class Renames(Pass):
    """Renames an output."""

    name: ClassVar[str] = "renames"

    @override
    def run(self, program: Program) -> Outcome:
        program.graph.outputs[0].name = "other"
        return Outcome(applied=1)


@dataclass(frozen=True)
class Declared(Renames):
    """Renames an output, and says that it does such things."""

    name: ClassVar[str] = "declared"
    changes_signature: ClassVar[bool] = True


@dataclass(frozen=True)
class Breaks(Pass):
    """Leaves an operator of a vendor."""

    name: ClassVar[str] = "breaks"

    @override
    def run(self, program: Program) -> Outcome:
        program.graph[0].domain = "com.vendor"
        return Outcome(applied=1)


@dataclass(frozen=True)
class Lowers(Breaks):
    """Leaves an operator of a vendor, as lowering passes may."""

    name: ClassVar[str] = "lowers"
    lowers: ClassVar[bool] = True


def test_a_pass_that_changes_the_signature_must_say_so() -> None:
    with pytest.raises(PassError, match="renames"):
        Pipeline((Renames(),)).run(program(TEXT))

    assert Pipeline((Declared(),)).run(program(TEXT)).graph.outputs[0].name == "other"


def test_a_pass_that_leaves_the_dialect_is_stopped_unless_it_lowers() -> None:
    with pytest.raises(PassError, match=r"com\.vendor"):
        Pipeline((Breaks(),)).run(program(TEXT))

    assert Pipeline((Lowers(),)).run(program(TEXT)).graph[0].domain == "com.vendor"


def test_an_outcome_counts_and_names() -> None:
    outcome = Outcome()
    assert outcome.modified is False
    outcome.hit(2)
    outcome.miss(ir.node("Relu", []), "no name", "norm")
    outcome.miss("label", "a name")

    assert outcome == Outcome(2, outcome.missed)
    assert outcome.missed == [Miss("Relu", "no name", "norm"), Miss("label", "a name")]
