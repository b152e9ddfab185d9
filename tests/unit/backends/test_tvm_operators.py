"""Each operator that TVM compiles for us computes what ONNX says it does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.programs import evaluate, program

from llmopt.backends.base import Demand
from llmopt.backends.tvm import TvmCpu
from llmopt.backends.tvm.session import open_session
from llmopt.errors import UnsupportedModelError
from llmopt.passes.pipeline import Pipeline

RNG = np.random.default_rng(4)
X = RNG.standard_normal((2, 3, 8), np.float32)
Z = RNG.standard_normal((2, 3, 8), np.float32)
IDS = np.array([[4, 0, 2], [1, 1, 3]], np.int64)


def compiled(text: str, folder: Path) -> Any:
    """Return a graph of text, and a function that runs it compiled."""
    made = program(text)
    backend = TvmCpu()
    assert backend.check(made) == []
    Pipeline(backend.passes(None)).run(made)
    backend.write(made, folder, Demand())
    return open_session(folder / "model.so")


def same(text: str, feeds: Mapping[str, npt.NDArray[Any]], folder: Path) -> None:
    """Check every output of a graph, its type and shape too."""
    wanted = evaluate(program(text), feeds)
    found = compiled(text, folder)(feeds)
    assert found.keys() == wanted.keys()
    for name, right in wanted.items():
        assert found[name].dtype == right.dtype, name
        assert found[name].shape == right.shape, name
        assert np.allclose(found[name], right, rtol=1e-5, atol=1e-5), name


def graph(lines: str, inputs: str, names: Mapping[str, str], constants: str = "") -> str:
    """Return the text of a graph whose outputs are of the types given."""
    outputs = ", ".join(f"{kind} {name}" for name, kind in names.items())
    return f"main ({inputs}) => ({outputs})\n{constants}\n{{\n{lines}\n}}"


FLOATS = {
    "a": "Abs (x)",
    "b": "Sqrt (p)",
    "c": "Log (p)",
    "d": "Exp (x)",
    "e": "Reciprocal (p)",
    "f": "Tanh (x)",
    "g": "Sigmoid (z)",
    "h": "Erf (x)",
    "i": "Neg (z)",
    "j": "Sin (x)",
    "k": "Cos (z)",
    "l": "Floor (x)",
    "m": "Ceil (z)",
    "n": "Round (x)",
    "o": "Sign (z)",
    "q": "Softplus (x)",
    "r": "Gelu (x)",
    "s": 'Gelu <approximate = "tanh"> (z)',
    "t": "Swish <alpha = 1.5> (x)",
    "u": "Relu (z)",
    "v": "Clip (x, low, high)",
    "w": "Pow (p, two)",
    "aa": "Max (x, z, one)",
    "ab": "Min (x, z)",
    "ac": "Div (x, p)",
    "ad": "Mul (x, z)",
    "ae": "Sub (x, z)",
    "af": "Where (lt, x, z)",
    "ag": "Softmax <axis = -1> (x)",
    "ah": "CumSum (x, last)",
    "ai": "Swish (x)",
}


CONSTANTS = (
    "<float one = {1}, float two = {2}, float low = {-0.5}, float high = {0.5}, int64 last = {2}, "
    "int64[1] axis = {-1}, int64[2] pair = {0, 2}, int64[2] parts = {3, 5}, "
    "int64[4] heads = {0, 0, 2, 4}, int64[1] m1 = {-1}, int64[1] zero1 = {0}, "
    "int64[1] one1 = {1}, int64[1] end = {9223372036854775807}, "
    "float[5,8] table = {"
    + ",".join(map(str, range(40)))
    + "}, float scale = {0.03}, uint8 middle = {128}, int64 start = {0}, int64 step = {1}, "
    "int64 two64 = {2}, int64 three = {3}>"
)
TWO = "float[B,S,8] x, float[B,S,8] z"


def test_elementwise_operators(tmp_path: Path) -> None:
    before = ["p0 = Abs (x)", "p = Add (p0, one)", "lt = Less (x, z)"]
    lines = "\n".join(before + [f"{name} = {text}" for name, text in FLOATS.items()])
    kinds = dict.fromkeys(FLOATS, "float[B,S,8]")

    same(graph(lines, TWO, kinds, CONSTANTS), {"x": X, "z": Z}, tmp_path)


BOOLEANS = {
    "a": "Less (x, z)",
    "b": "LessOrEqual (x, x)",
    "c": "Greater (x, z)",
    "d": "GreaterOrEqual (x, x)",
    "e": "Equal (x, x)",
    "f": "Not (a)",
    "g": "And (a, b)",
    "h": "Or (a, b)",
    "i": "Xor (a, b)",
    "j": "Cast <to = 9> (x)",
}


def test_comparisons_and_logic(tmp_path: Path) -> None:
    lines = "\n".join(f"{name} = {text}" for name, text in BOOLEANS.items())
    kinds = dict.fromkeys(BOOLEANS, "bool[B,S,8]")

    same(graph(lines, TWO, kinds), {"x": X, "z": Z}, tmp_path)


SHAPED = {
    "a": ("Reshape (x, heads)", "float[B,S,2,4]"),
    "b": ("Transpose <perm = [2, 0, 1]> (x)", "float[8,B,S]"),
    "c": ("Unsqueeze (x, pair)", "float[1,B,1,S,8]"),
    "d": ("Squeeze (c, pair)", "float[B,S,8]"),
    "e": ("Concat <axis = 1> (x, z)", "float[B,N,8]"),
    "g": ("Slice (x, zero1, one1, one1)", "float[B,M,8]"),
    "h": ("Slice (x, m1, end, one1)", "float[B,L,8]"),
    "i": ("Expand (part, whole)", "float[B,S,8]"),
    "j": ("Flatten <axis = 2> (x)", "float[R,8]"),
    "k": ("Gather (table, ids)", "float[B,S,8]"),
    "l": ("Gather <axis = 2> (x, pair)", "float[B,S,2]"),
    "m": ("ReduceSum (x, axis)", "float[B,S,1]"),
    "n": ("ReduceMean <keepdims = 0> (x, axis)", "float[B,S]"),
    "o": ("ReduceMax (x, axis)", "float[B,S,1]"),
    "p": ("ReduceMin (x, axis)", "float[B,S,1]"),
    "q": ("ReduceL2 (x, axis)", "float[B,S,1]"),
    "r": ("MatMul (x, turned)", "float[B,S,S]"),
    "s": ("Range (start, count, step)", "int64[S]"),
    "t": ("ConstantOfShape (whole)", "float[B,S,8]"),
    "u": ("Trilu <upper = 0> (r)", "float[B,S,S]"),
    "v": ("DequantizeLinear (codes, scale, middle)", "float[B,S,8]"),
    "w": ("Mod (ids, two64)", "int64[B,S]"),
    "aa": ("Div (ids, two64)", "int64[B,S]"),
    "ab": ("GatherElements <axis = 1> (n, ids2)", "float[B,S]"),
}


def test_operators_that_move_numbers(tmp_path: Path) -> None:
    before = [
        "whole = Shape (x)",
        "sizes = Shape <start = 1, end = 2> (x)",
        "count = Squeeze (sizes)",
        "turned = Transpose <perm = [0, 2, 1]> (z)",
        "part = Slice (x, zero1, one1, m1)",
        "codes = QuantizeLinear (x, scale, middle)",
        "ids2 = Mod (ids, three)",
        "front, back = Split <axis = -1> (x, parts)",
    ]
    lines = "\n".join(before + [f"{name} = {text}" for name, (text, _) in SHAPED.items()])
    kinds = {name: kind for name, (_, kind) in SHAPED.items()}
    kinds |= {"front": "float[B,S,3]", "back": "float[B,S,5]"}
    text = graph(lines, TWO + ", int64[B,S] ids", kinds, CONSTANTS)

    same(text, {"x": X, "z": Z, "ids": IDS}, tmp_path)


MASKED = {
    "a": "Attention <q_num_heads = 4, kv_num_heads = 2, scale = 0.4> (x, k, v, bias)",
    "b": "Attention <q_num_heads = 4, kv_num_heads = 2, softcap = 2.0> (x, k, v, seen)",
    "c": "Attention <q_num_heads = 4, kv_num_heads = 2, is_causal = 1> (x, k, v)",
    "d": "Attention <q_num_heads = 4, kv_num_heads = 2, "
    "left_window_size = 1, right_window_size = 0> (x, k, v)",
}


def test_attention_with_any_mask(tmp_path: Path) -> None:
    lines = "\n".join(f"{name} = {text}" for name, text in MASKED.items())
    kinds = dict.fromkeys(MASKED, "float[B,S,8]")
    inputs = (
        "float[B,S,8] x, float[B,S,4] k, float[B,S,4] v, float[B,1,S,S] bias, bool[B,1,S,S] seen"
    )
    seen = np.tril(np.ones((2, 1, 3, 3), bool))
    bias = RNG.standard_normal((2, 1, 3, 3)).astype(np.float32)
    feeds = {"x": X, "k": Z[..., :4], "v": X[..., 4:], "bias": bias, "seen": seen}
    text = graph(lines, inputs, kinds)

    wanted = {name: _attention(feeds, name) for name in MASKED}
    found = compiled(text, tmp_path)(feeds)
    for name, right in wanted.items():
        assert np.allclose(found[name], right, atol=1e-5), name


def _attention(feeds: Mapping[str, npt.NDArray[Any]], name: str) -> npt.NDArray[Any]:
    q = feeds["x"].reshape(2, 3, 4, 2).transpose(0, 2, 1, 3)
    k, v = (feeds[n].reshape(2, 3, 2, 2).transpose(0, 2, 1, 3).repeat(2, 1) for n in ("k", "v"))
    scores = q @ k.transpose(0, 1, 3, 2) * (0.4 if name == "a" else 2**-0.5)
    if name == "b":
        scores = 2.0 * np.tanh(scores / 2.0)
    near = np.tril(np.ones((3, 3), bool))
    if name == "d":
        near &= ~np.tril(np.ones((3, 3), bool), -2)
    masks = {"b": feeds["seen"], "c": near, "d": near}
    scores = scores + feeds["bias"] if name == "a" else np.where(masks[name], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ v
    return np.asarray(mixed.transpose(0, 2, 1, 3).reshape(2, 3, 8))


def test_sizes_that_depend_on_numbers_are_refused(tmp_path: Path) -> None:
    text = graph("y = Expand (x, n)", "float[1,8] x, int64[2] n", {"y": "float[A,8]"})
    with pytest.raises(UnsupportedModelError, match=r"Expand \('y'\) takes sizes that depend"):
        compiled(text, tmp_path)


def test_forms_of_operators_without_a_kernel_are_listed() -> None:
    made = program(
        graph(
            "y = RotaryEmbedding <num_heads = 2> (x, cos, sin)",
            "float[B,S,8] x, float[B,S,2] cos, float[B,S,2] sin",
            {"y": "float[B,S,8]"},
        )
    )
    assert TvmCpu().check(made) == ["RotaryEmbedding ('y') has no position_ids"]
