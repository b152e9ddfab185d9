"""Heads that are taken apart in the ways that people do: nothing is moved that need not be."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from layouts import BLOCKS
from support.programs import error_rel, evaluate, inputs, operators

from llmopt.backends import find_backend
from llmopt.backends.base import Demand
from llmopt.frontend.base import SourceOptions
from llmopt.frontend.source import open_source
from llmopt.ir import graph as g
from llmopt.ir.feeds import Case
from llmopt.ir.program import Program
from llmopt.passes.pipeline import Pipeline, Ran

pytestmark = pytest.mark.xdist_group("layouts")  # of which the model is traced once

MODELS: Final = Path(__file__).parents[2] / "models"
LAYOUTS: Final = ("split-rows", "merge-reshapes", "push-transposes", "order-columns")
TOLERANCE: Final = 1e-5  # float32, max|a-b| / max|b|


@dataclass(frozen=True)
class Laid:
    """An encoder before and after the default pipeline, and after it without layouts."""

    before: Program
    after: Program
    without: Program
    ran: tuple[Ran, ...]


@functools.cache
def laid() -> Laid:
    before = open_source(f"{MODELS / 'layouts'}.py:make", SourceOptions()).program
    ran: list[Ran] = []
    after = Pipeline.parse("default").run(before.clone(), lambda *step: ran.append(step[2]))
    left_out = ",".join(f"-{name}" for name in LAYOUTS)
    without = Pipeline.parse(f"default,{left_out}").run(before.clone())
    return Laid(before, after, without, tuple(ran))


def test_no_transpose_is_left_of_any_way_to_take_heads_apart() -> None:
    found, without = operators(laid().after), operators(laid().without)

    assert found.count("Attention") == without.count("Attention") == len(BLOCKS)
    assert without.count("Transpose") > 6
    assert found.count("Transpose") == 0
    assert found.count("Reshape") < without.count("Reshape")


def test_queries_keys_and_values_are_parts_of_one_row() -> None:
    for node in g.nodes(laid().after.graph, "Attention"):
        v = g.producer(node.inputs[2], "Split")
        assert v is not None
        assert g.attribute(v, "axis", 0) == -1
        assert g.producer(v.inputs[0], "Add") is not None


def test_the_numbers_stay() -> None:
    for case in (Case(1, 1), Case(1, 7), Case(3, 5)):
        given = inputs(laid().before, case, 37)
        for name, want in evaluate(laid().before, given).items():
            assert error_rel(evaluate(laid().after, given)[name], want) < TOLERANCE


def test_nothing_is_missed_and_a_second_run_changes_nothing() -> None:
    again = laid().after.clone()
    ran: list[Ran] = []
    Pipeline.parse("default").run(again, lambda *step: ran.append(step[2]))

    assert {step.name: step.applied for step in ran if step.applied} == {}
    missed = [miss for step in laid().ran for miss in step.missed if step.name in LAYOUTS]
    assert missed == []


def test_kernels_of_tvm_read_the_row_as_it_is(tmp_path: Path) -> None:
    backend = find_backend("tvm-cpu")
    lowered = Pipeline(backend.passes(None)).run(laid().after.clone())

    found = operators(lowered)
    assert found.count("PackedAttention") == 2
    assert "Transpose" not in found
    run = backend.open(tmp_path / backend.write(lowered, tmp_path, Demand()).entry)
    given = inputs(laid().before, Case(3, 5), 37)
    for name, want in evaluate(laid().before, given).items():
        assert error_rel(run(given)[name], want) < TOLERANCE


def test_columns_that_are_in_order_are_not_copied() -> None:
    names = [str(name) for name in laid().after.graph.initializers]

    ordered = sorted(name for name in names if name.endswith(".ordered"))
    assert [name.split(".")[1] for name in ordered] == ["1", "1"]  # a weight and its bias
