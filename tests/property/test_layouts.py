"""Layouts of random graphs: no number changes, less is moved, and a second run does nothing."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layout_graphs import SIZES, computations, parted, shapings
from support.programs import apply, bound, error_rel, evaluate, operators, program

from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes.movements import Movement, stays

quick: Final = settings(max_examples=40)


def moving(of: Program) -> tuple[int, int]:
    """Return how many transposes and how many other operators that only move numbers are left."""
    found = operators(of)
    return found.count("Transpose"), sum(
        found.count(name) for name in ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
    )


@quick
@given(shapings())
def test_merged_reshapes_keep_every_number_and_are_never_more(
    chain: tuple[str, list[int]],
) -> None:
    body, sizes = chain
    made = program(f"main (float[2,3,4,5] x) => (float{sizes} y) {{\n{body}\n}}")
    x = np.arange(120, dtype=np.float32).reshape(SIZES)
    want, before = evaluate(made, {"x": x})["y"], moving(made)

    applied = apply("merge-reshapes", made).applied

    assert (moving(made) < before) == bool(applied)
    assert moving(made)[0] <= before[0]
    np.testing.assert_array_equal(evaluate(made, {"x": x})["y"], want, strict=True)
    assert not apply("merge-reshapes", made).applied


@quick
@given(st.lists(st.integers(0, 99), min_size=1, max_size=6))
def test_every_plan_of_a_movement_does_what_the_chain_does(choices: list[int]) -> None:
    movement, x = Movement.start(SIZES), np.arange(120).reshape(SIZES)
    want = x
    for choice in choices:
        if choice % 2:
            order = np.random.default_rng(choice).permutation(want.ndim)
            movement, want = movement.transposed([*map(int, order)]), want.transpose(order)
            continue
        ways = parted(list(want.shape))
        reshaped = movement.reshaped(ways[choice % len(ways)])
        if reshaped is not None:
            movement, want = reshaped, want.reshape(ways[choice % len(ways)])

    for plan in movement.plans():
        got = x
        for step in plan:
            got = got.transpose(step.order) if step.order else got.reshape([*map(int, step.sizes)])
        np.testing.assert_array_equal(got, want, strict=True)


def turned_elements(of: Program) -> int:
    """Return how many numbers transposes move."""
    total = 0
    for node in g.nodes(of.graph, "Transpose"):
        sizes = g.shape(node.inputs[0])
        order = g.attribute(node, "perm", ())
        assert sizes is not None
        if not stays(sizes, order):
            total += math.prod(size for size in sizes if isinstance(size, int))
    return total


@settings(max_examples=60)
@given(computations())
def test_pushed_transposes_keep_every_number_and_move_fewer(text: str) -> None:
    made = program(text)
    apply("remove-dead", made)  # as in a pipeline: who reads in vain holds transposes back, too
    rng = np.random.default_rng(7)
    given_ = {name: rng.standard_normal(SIZES, np.float32) for name in ("x", "z")}
    want, before = evaluate(made, given_), turned_elements(made)

    applied = apply("push-transposes", made).applied

    after = turned_elements(made)
    assert after < before if applied else after == before
    for name, array in evaluate(made, given_).items():
        np.testing.assert_allclose(array, want[name], rtol=1e-5, atol=1e-6, strict=True)
    assert not apply("push-transposes", made).applied


@quick
@given(
    inner=st.sampled_from([(2, 3), (3, 2), (2, 3, 2), (2, 4, 2), (2, 2, 2, 2)]),
    axis=st.integers(0, 3),
    by=st.sampled_from(["Split", "Gather", "Slice"]),
    turn=st.booleans(),
)
def test_ordered_columns_compute_the_same(
    *, inner: tuple[int, ...], axis: int, by: str, turn: bool
) -> None:
    width, axis = math.prod(inner), axis % len(inner)
    sizes = list(inner)
    parts, lines = [], []
    for place in range(inner[axis]):
        of = [*sizes[:axis], *([] if by == "Gather" else [1]), *sizes[axis + 1 :]]
        parts.append(f"float[B,S,{','.join(map(str, of))}] y{place}")
        if by == "Gather":
            lines.append(f"i{place} = Constant <value_int = {place}> ()")
            lines.append(f"p{place} = Gather <axis = {axis + 2}> (r, i{place})")
        elif by == "Slice":
            for name, number in (("i", place), ("j", place + 1), ("k", axis + 2)):
                lines.append(f"{name}{place} = Constant <value_ints = {[number]}> ()")
            lines.append(f"p{place} = Slice (r, i{place}, j{place}, k{place})")
        lines.append(f"y{place} = Tanh (p{place})")
    if by == "Split":
        names = ", ".join(f"p{place}" for place in range(inner[axis]))
        lines.insert(0, f"{names} = Split <axis = {axis + 2}, num_outputs = {inner[axis]}> (r)")
    rng = np.random.default_rng(width)
    shape = (width, 4) if turn else (4, width)
    arrays: dict[str, Any] = {
        "w": rng.standard_normal(shape, np.float32),
        "b": rng.standard_normal(width, np.float32),
    }
    lines[:0] = [
        *(["t = Transpose <perm = [1, 0]> (w)"] if turn else []),
        f"m = MatMul (x, {'t' if turn else 'w'})",
        "s = Add (m, b)",
        f"heads = Constant <value_ints = {[0, 0, *sizes]}> ()",
        "r = Reshape (s, heads)",
    ]
    edge = f"float[B,S,4] x, float[{shape[0]},{shape[1]}] w, float[{width}] b"
    body = "\n".join(lines)
    made = bound(f"main ({edge}) => ({', '.join(parts)}) {{\n{body}\n}}", arrays)
    x = {"x": rng.standard_normal((2, 3, 4), np.float32)}
    want = evaluate(made, x)
    apply("fold-weights", made)

    assert apply("order-columns", made).applied == 1

    assert operators(made).count("Split") == 1
    assert not {"Gather", "Slice"} & {*operators(made)}
    for name, array in evaluate(made, x).items():
        assert error_rel(array, want[name]) < 1e-5
    assert apply("order-columns", made).applied == 0
