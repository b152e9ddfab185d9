"""Random graphs of what moves numbers, as ONNX's text, for tests of layouts."""

from __future__ import annotations

import math
from typing import Final

from hypothesis import strategies as st

SIZES: Final = (2, 3, 4, 5)
Named = dict[str, tuple[int, ...]]
"""Sizes of values by name."""


@st.composite
def shapings(draw: st.DrawFn) -> tuple[str, list[int]]:
    """Return the body of a chain of all that only moves numbers and its last sizes."""
    sizes, lines, value = list(SIZES), [], "x"
    for step in range(draw(st.integers(1, 7))):
        name = f"v{step}"
        kind = draw(st.sampled_from(["Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"]))
        if kind == "Transpose":
            order = draw(st.permutations(range(len(sizes))))
            lines.append(f"{name} = Transpose <perm = {list(order)}> ({value})")
            sizes = [sizes[axis] for axis in order]
        elif kind == "Flatten":
            axis = draw(st.integers(0, len(sizes)))
            lines.append(f"{name} = Flatten <axis = {axis}> ({value})")
            sizes = [math.prod(sizes[:axis]), math.prod(sizes[axis:])]
        elif kind == "Reshape":
            sizes = draw(st.sampled_from(parted(sizes)))
            lines.append(f"{name}t = Constant <value_ints = {sizes}> ()")
            lines.append(f"{name} = Reshape ({value}, {name}t)")
        else:
            ones = [axis for axis, size in enumerate(sizes) if size == 1]
            axis = draw(st.sampled_from(ones) if kind == "Squeeze" and ones else st.just(0))
            kind = "Squeeze" if kind == "Squeeze" and ones else "Unsqueeze"
            sizes = [*sizes[:axis], *sizes[axis + 1 :]] if kind == "Squeeze" else [1, *sizes]
            lines.append(f"{name}t = Constant <value_ints = {[axis]}> ()")
            lines.append(f"{name} = {kind} ({value}, {name}t)")
        value = name
    lines.append(f"y = Relu ({value})")
    return "\n".join(lines), sizes


def parted(sizes: list[int]) -> list[list[int]]:
    """Return what a reshape may make of sizes: neighbours joined, one parted, or all anew."""
    joined = [[*sizes[:i], sizes[i] * sizes[i + 1], *sizes[i + 2 :]] for i in range(len(sizes) - 1)]
    parted = [
        [*sizes[:i], factor, size // factor, *sizes[i + 1 :]]
        for i, size in enumerate(sizes)
        for factor in range(2, size)
        if size % factor == 0
    ]
    return [*joined, *parted, sorted(sizes), [math.prod(sizes)]]


@st.composite
def computations(draw: st.DrawFn) -> str:
    """Return a graph of transposes and of what computes alike in either order."""
    sizes: dict[str, tuple[int, ...]] = {"x": SIZES, "z": SIZES}
    lines: list[str] = []
    for step in range(draw(st.integers(2, 9))):
        value = draw(st.sampled_from(sorted(sizes)[-3:]))
        kind = draw(st.sampled_from(sorted(_COMPUTED)))
        line, found = _COMPUTED[kind](draw, f"v{step}", value, sizes)
        lines += line
        sizes |= found
    read = [name for name in sizes if not any(f"({name}" in each for each in lines)] or ["x"]
    outs = [f"y{name}" for name in read]
    lines += [f"y{name} = Relu ({name})" for name in read]
    edge = ", ".join(
        f"float{list(sizes[name])} {out}" for name, out in zip(read, outs, strict=True)
    )
    body = "\n".join(lines)
    return f"main (float[2,3,4,5] x, float[2,3,4,5] z) => ({edge}) {{\n{body}\n}}"


def _turn(draw: st.DrawFn, name: str, value: str, sizes: Named) -> tuple[list[str], Named]:
    order = list(draw(st.permutations(range(len(sizes[value])))))
    found = tuple(sizes[value][axis] for axis in order)
    return [f"{name} = Transpose <perm = {order}> ({value})"], {name: found}


def _plain(draw: st.DrawFn, name: str, value: str, sizes: Named) -> tuple[list[str], Named]:
    op = draw(st.sampled_from(["Neg", "Softmax <axis = 1>", "Tanh", "Softmax"]))
    op = op if len(sizes[value]) > 1 else "Neg"
    return [f"{name} = {op} ({value})"], {name: sizes[value]}


def _sum(draw: st.DrawFn, name: str, value: str, sizes: Named) -> tuple[list[str], Named]:
    others = [other for other in sorted(sizes) if sizes[other] == sizes[value]]
    other = draw(st.sampled_from(others))
    return [f"{name} = Add ({value}, {other})"], {name: sizes[value]}


def _scaled(draw: st.DrawFn, name: str, value: str, sizes: Named) -> tuple[list[str], Named]:
    inner = list(sizes[value][-draw(st.integers(1, 2)) :])
    inner[0] = draw(st.sampled_from([1, inner[0]]))
    numbers = ", ".join(str(n % 7 + 1.0) for n in range(math.prod(inner)))
    lines = [f"{name}c = Constant <value = float{inner} {{{numbers}}}> ()"]
    return [*lines, f"{name} = Mul ({name}c, {value})"], {name: sizes[value]}


def _parts(draw: st.DrawFn, name: str, value: str, sizes: Named) -> tuple[list[str], Named]:
    of = sizes[value]
    axis = draw(st.integers(0, len(of) - 1))
    if of[axis] < 2:
        return [f"{name} = Abs ({value})"], {name: of}
    rest = of[axis] - 1
    lines = [f"{name}s = Constant <value_ints = {[1, rest]}> ()"]
    lines.append(f"{name}a, {name}b = Split <axis = {axis}> ({value}, {name}s)")
    lines.append(f"{name} = Concat <axis = {axis}> ({name}b, {name}a)")
    first, second = ((*of[:axis], size, *of[axis + 1 :]) for size in (1, rest))
    return lines, {f"{name}a": first, f"{name}b": second, name: of}


def _fewer(draw: st.DrawFn, name: str, value: str, sizes: Named) -> tuple[list[str], Named]:
    of = sizes[value]
    if len(of) < 3:
        return [f"{name} = Exp ({value})"], {name: of}
    axis = draw(st.integers(0, len(of) - 1))
    left = (*of[:axis], *of[axis + 1 :])
    if draw(st.booleans()):
        lines = [f"{name}i = Constant <value_int = 0> ()"]
        return [*lines, f"{name} = Gather <axis = {axis}> ({value}, {name}i)"], {name: left}
    lines = [f"{name}i = Constant <value_ints = {[axis]}> ()"]
    return [*lines, f"{name} = ReduceMax <keepdims = 0> ({value}, {name}i)"], {name: left}


def _joined(draw: st.DrawFn, name: str, value: str, sizes: Named) -> tuple[list[str], Named]:
    of = draw(st.sampled_from(parted(list(sizes[value]))))
    lines = [f"{name}t = Constant <value_ints = {of}> ()"]
    return [*lines, f"{name} = Reshape ({value}, {name}t)"], {name: tuple(of)}


_COMPUTED: Final = {
    "turn": _turn,
    "turn again": _turn,
    "plain": _plain,
    "sum": _sum,
    "scaled": _scaled,
    "parts": _parts,
    "fewer": _fewer,
    "joined": _joined,
}
