"""Each case in *.ir: the text a pipeline leaves, what it declines, and the numbers it keeps.

A case is a comment that says why, ``--- name | pipeline | options``, the graph before, ``=>``,
the graph after (or ``unchanged``), and a line ``!! node: reason`` for each miss. Options are
``limit=N``, the most tokens, ``weights=a+b``, the initializers that are parameters,
``vocabulary=N`` tokens, 11 if not set, ``task=generate``, and ``tolerance=X`` of passes
that round, relative to the largest number of an output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import pytest
from support.programs import HEAD, evaluate, inputs, program, run

from llmopt.backends.onnxruntime import finish
from llmopt.backends.onnxruntime.lower_attention import LowerAttention
from llmopt.backends.onnxruntime.lower_norms import FuseSkipNorm, LowerActivations
from llmopt.backends.onnxruntime.lower_weights import LowerWeights
from llmopt.interface.arrays import Arrays
from llmopt.ir.feeds import Case
from llmopt.ir.program import Program
from llmopt.passes import known_passes
from llmopt.passes.base import Miss, Pass
from llmopt.passes.pipeline import Pipeline

TOLERANCE: Final = 1e-5  # float32, absolute and relative: fused operators sum in another order
LAYOUT: Final = re.compile(
    r"^--- (?P<name>.+?) \| (?P<pipeline>[^|\n]+?)(?: \| (?P<options>.+?))?\n"
    r"(?P<before>.+?)^=>\n(?P<after>.*?)(?P<missed>(?:^!! [^\n]*\n)*)(?=^\n|^#|^---|\Z)",
    re.MULTILINE | re.DOTALL,
)
TABLE: Final = re.compile(r"(?<=  )\{-?\d+\.[^{}]{120,}\}|(?<=  )\{[^{}]*\.[^{}]{120,}\}")
LOWERING: Final = (LowerAttention, FuseSkipNorm, LowerActivations, LowerWeights)
KNOWN: Final[Mapping[str, type[Pass]]] = known_passes() | {cls.name: cls for cls in LOWERING}


@dataclass(frozen=True)
class Golden:
    """One case of a golden file."""

    file: Path
    name: str
    pipeline: str
    options: str
    before: str
    after: str
    missed: str

    def option(self, name: str, default: float) -> float:
        """Return an option that is a number."""
        value = re.search(rf"{name}=(\S+)", self.options)
        return float(value[1]) if value else default

    def program(self) -> Program:
        """Return the Program before."""
        weights = re.search(r"weights=(\S+)", self.options)
        sizes = {"limit": int(self.option("limit", 64)), "vocabulary": self.vocabulary}
        before = program(self.before, weights=weights[1].split("+") if weights else (), **sizes)
        if "task=generate" in self.options:
            before.learn(task="generate")
        return before

    @property
    def vocabulary(self) -> int:
        """The number of tokens."""
        return int(self.option("vocabulary", 11))

    def run(self) -> tuple[Program, bool, list[Miss]]:
        """Return the Program after, whether a pass says it changed it, and every miss."""
        made, applied, missed = self.program(), 0, []
        steps: list[Any] = []
        Pipeline.parse(self.pipeline, known=KNOWN).run(made, lambda *ran: steps.append(ran[2]))
        if self.lowers:
            finish(made.model)
        for step in steps:
            applied += step.applied
            missed += step.missed
        return made, applied > 0, missed

    @property
    def lowers(self) -> bool:
        """Whether vendor operators come out, which only their runtime evaluates."""
        return any(item.lowers for item in Pipeline.parse(self.pipeline, known=KNOWN).passes)


def cases() -> list[Any]:
    """Collect every case of every golden file."""
    return [
        pytest.param(Golden(file, **groups), id=f"{file.stem}: {groups['name']}")
        for file in sorted(Path(__file__).parent.glob("*.ir"))
        for match in LAYOUT.finditer(file.read_text())
        if (groups := match.groupdict(default=""))
    ]


def text(of: Program) -> str:
    """Return the graph's text, without labels and inner shapes, which may change freely.

    Numbers of long tables are left out: their last digits differ between processors.
    """
    model = of.model.clone()
    edge = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph:
        node.name = None
    made = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.initializers.values(), *made):
        if value not in edge:
            value.shape = value.type = None
    full: str = ir.to_onnx_text(model)
    short = TABLE.sub("{...}", full.partition(">\n")[2])
    lines = short.strip().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


@pytest.mark.parametrize("case", cases())
def test_the_pipeline_leaves_this_text_and_gives_these_reasons(
    case: Golden, request: pytest.FixtureRequest
) -> None:
    made, changed, missed = case.run()
    reasons = "".join(f"!! {miss.node}: {miss.reason}\n" for miss in missed)
    got = text(made) if changed else "unchanged\n"
    if request.config.getoption("--update-golden"):
        old = case.file.read_text()
        entry = f"{case.before}=>\n"
        tail = f"{case.after}{case.missed}"
        assert old.count(entry + tail) == 1
        case.file.write_text(old.replace(entry + tail, f"{entry}{got}{reasons}"))
        return

    assert got == case.after
    assert reasons == case.missed
    assert changed == (text(made) != text(case.program()))


@pytest.mark.parametrize("case", cases())
def test_the_numbers_stay(case: Golden) -> None:
    compute = run if case.lowers else evaluate
    rounded = case.option("tolerance", 0)
    made, _, _ = case.run()

    for probe in (Case(1, 7), Case(3, 5)):
        given = inputs(case.program(), probe, case.vocabulary)
        want, got = evaluate(case.program(), given), compute(made, _as_signed(made, given, probe))
        if made.signature == case.program().signature:
            assert list(got) == list(want)
        for name, array in want.items():
            atol = rounded * np.abs(array).max() or TOLERANCE
            rtol = 0 if rounded else TOLERANCE
            np.testing.assert_allclose(
                got[name], array, rtol=rtol, atol=atol, strict=True, err_msg=name
            )


def _as_signed(made: Program, given: Arrays, probe: Case) -> Arrays:
    """Return the inputs of a Program whose signature a pass has changed, logits for all tokens."""
    extended = {**inputs(made, probe), **given}
    if "logits_to_keep" in made.graph.initializers:
        extended["logits_to_keep"] = np.asarray(0)
    return {
        port.name: extended[port.name].astype(port.dtype)
        for port in made.signature.inputs
        if port.name in extended
    }


@pytest.mark.parametrize("case", cases())
def test_a_second_run_changes_nothing(case: Golden) -> None:
    made, _, _ = case.run()
    before = text(made)
    applied: list[int] = []

    Pipeline.parse(case.pipeline, known=KNOWN).run(
        made, lambda *ran: applied.append(ran[2].applied)
    )

    assert not any(applied)
    assert text(made) == before


def test_the_head_of_a_case_is_the_dialects() -> None:
    assert HEAD.strip() == '<ir_version: 11, opset_import: ["" : 25]>'
