"""Properties that hold for every graph of a kind, not for the cases somebody thought of."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.programs import apply, bound, error_rel, evaluate, operators, program

from llmopt.ir.feeds import Case
from llmopt.passes.canonicalize import reshape_target
from llmopt.passes.masks import Meaning, _explain, predict

SIZES: Final = (2, 3, 4, 5)
quick: Final = settings(max_examples=40)
orders = st.permutations(range(4)).map(list)


@st.composite
def movements(draw: st.DrawFn) -> tuple[str, list[int]]:
    """Return the body of a chain of transposes and reshapes of [2,3,4,5], and its last sizes."""
    sizes, lines, value = list(SIZES), [], "x"
    for step in range(draw(st.integers(1, 6))):
        name = f"v{step}"
        if draw(st.booleans()):
            order = draw(orders)
            lines.append(f"{name} = Transpose <perm = {order}> ({value})")
            sizes = [sizes[axis] for axis in order]
        else:
            sizes = list(draw(st.permutations(sizes)))
            lines.append(f"{name}t = Constant <value_ints = {sizes}> ()")
            lines.append(f"{name} = Reshape ({value}, {name}t)")
        value = name
    lines.append(f"y = Relu ({value})")
    return "\n".join(lines), sizes


@quick
@given(movements())
def test_chains_of_transposes_and_reshapes_keep_every_number(chain: tuple[str, list[int]]) -> None:
    body, sizes = chain
    made = program(f"main (float[2,3,4,5] x) => (float{sizes} y) {{\n{body}\n}}".replace("'", ""))
    x = np.arange(120, dtype=np.float32).reshape(SIZES)
    want = evaluate(made, {"x": x})["y"]

    for name in ("canonicalize", "cancel-transposes", "canonicalize", "cancel-transposes"):
        apply(name, made)

    np.testing.assert_array_equal(evaluate(made, {"x": x})["y"], want, strict=True)


@quick
@given(movements())
def test_transposes_come_to_rest(chain: tuple[str, list[int]]) -> None:
    body, sizes = chain
    made = program(f"main (float[2,3,4,5] x) => (float{sizes} y) {{\n{body}\n}}")
    apply("canonicalize", made)
    apply("cancel-transposes", made)

    for _ in range(6):
        if not apply("canonicalize", made).applied + apply("cancel-transposes", made).applied:
            break

    assert not apply("canonicalize", made).applied
    assert not apply("cancel-transposes", made).applied
    feeding = [
        n.inputs[0].producer() for n in made.graph if n.op_type == "Transpose" and n.inputs[0]
    ]
    assert "Transpose" not in [node.op_type for node in feeding if node is not None]


@quick
@given(
    width=st.integers(1, 5),
    heads=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    biased=st.lists(st.booleans(), min_size=3, max_size=3),
    turned=st.lists(st.booleans(), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_merged_projections_compute_the_same(  # noqa: PLR0913 - a projection has these parts
    *,
    width: int,
    heads: int,
    groups: int,
    biased: list[bool],
    turned: list[bool],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    outs = [heads * groups * 2, groups * 2, groups * 2]
    arrays: dict[str, Any] = {}
    edge, lines = [f"float[B,S,{width}] x"], []
    for name, out, bias, turn in zip("qkv", outs, biased, turned, strict=True):
        shape = (out, width) if turn else (width, out)
        arrays[f"w{name}"] = rng.standard_normal(shape, np.float32)
        edge.append(f"float[{shape[0]},{shape[1]}] w{name}")
        if turn:
            lines.append(f"t{name} = Transpose <perm = [1,0]> (w{name})")
        lines.append(f"p{name} = MatMul (x, {'t' if turn else 'w'}{name})")
        if bias:
            arrays[f"b{name}"] = rng.standard_normal(out, np.float32)
            edge.append(f"float[{out}] b{name}")
        lines.append(f"{name} = {f'Add (p{name}, b{name})' if bias else f'Identity (p{name})'}")
    attributes = f"q_num_heads = {heads * groups}, kv_num_heads = {groups}"
    lines.append(f"y = Attention <{attributes}> (q, k, v)")
    body = "\n".join(lines)
    made = bound(f"main ({', '.join(edge)}) => (float[B,S,{outs[0]}] y) {{\n{body}\n}}", arrays)
    x = {"x": rng.standard_normal((2, 3, width), np.float32)}
    want = evaluate(made, x)["y"]
    apply("canonicalize", made)
    apply("fold-weights", made)

    assert apply("merge-qkv", made).applied == 1

    assert operators(made).count("MatMul") == 1
    assert error_rel(evaluate(made, x)["y"], want) < 1e-5
    assert apply("merge-qkv", made).applied == 0


dims = st.lists(st.sampled_from(["B", "S", 2, 3, 6]), min_size=1, max_size=4)


@quick
@given(dims, dims)
def test_a_reshape_target_makes_the_sizes_it_is_for(before: list[Any], after: list[Any]) -> None:
    sizes = {"B": 5, "S": 7}
    have, want = ([sizes.get(d, d) for d in side] for side in (before, after))
    if np.prod(have) != np.prod(want):
        return

    target = reshape_target(before, after)

    if target is not None:
        filled = [have[i] if size == 0 else size for i, size in enumerate(target)]
        assert np.zeros(have).reshape(filled).shape == tuple(want)


@quick
@given(
    causal=st.booleans(),
    left=st.integers(0, 5) | st.just(-1),
    padding=st.booleans(),
    cached=st.booleans(),
)
def test_a_meaning_is_found_again_in_what_it_predicts(
    *, causal: bool, left: int, padding: bool, cached: bool
) -> None:
    meaning = Meaning(causal, left, -1, padding=padding)
    sides = ("none", "left", "right") if padding else ("none",)
    cases = [Case(3, 5, past, side) for past in ((0, 4) if cached else (0,)) for side in sides]
    cases.append(Case(1, 3, 12) if cached else Case(1, 12))

    found = _explain([(case, predict(meaning, case)[0]) for case in cases], padded=padding)

    assert found == meaning
