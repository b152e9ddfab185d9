"""The evaluator computes what torch computes, where onnx's own does and where it does not."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from support.programs import program

from llmopt.errors import ArtifactError, LlmoptError
from llmopt.ir.evaluator import Evaluator, lacking, open_model
from llmopt.ir.program import Program

B, H, G, D = 2, 4, 2, 8


@dataclass(frozen=True)
class Heads:
    """One attention.

    Args:
        new: S.
        past: P; None where there is no cache.
        padding: Whether a mask [B, 1, 1, T] leaves out the first two keys of the second row.
        causal: Whether keys after the query are left out.
        window: How many keys a query sees back, itself included; 0 for all.
        softcap: Bound of the scores; 0 for none.
    """

    new: int = 5
    past: int | None = 3
    padding: bool = True
    causal: bool = True
    window: int = 0
    softcap: float = 0.0

    @property
    def total(self) -> int:
        """T."""
        return self.new + (self.past or 0)

    def program(self) -> Program:
        """Return it in the dialect."""
        past = "float[B,2,P,8] pk, float[B,2,P,8] pv" if self.past is not None else ""
        mask = "bool[B,1,1,T] mask" if self.padding else ""
        extra = "".join(f", {text}" for text in (mask, past) if text)
        reads = ["q", "k", "v"] + ["mask"] * self.padding
        if self.past is not None:
            reads += [""] * (not self.padding) + ["pk", "pv"]
        cap = f", softcap = {self.softcap}" if self.softcap else ""
        back = f", left_window_size = {self.window - 1}" if self.window else ""
        return program(
            f"""main (float[B,S,32] q, float[B,S,16] k, float[B,S,16] v{extra})
            => (float[B,S,32] y, float[B,2,T,8] present_key, float[B,2,T,8] present_value)
            {{ y, present_key, present_value = Attention <q_num_heads = 4, kv_num_heads = 2,
               is_causal = {int(self.causal)}{cap}{back}> ({", ".join(reads)}) }}"""
        )

    def feeds(self) -> dict[str, npt.NDArray[Any]]:
        """Return random operands."""
        rng = np.random.default_rng(4)
        shapes: dict[str, tuple[int, ...]]
        shapes = {"q": (B, self.new, H * D), "k": (B, self.new, G * D), "v": (B, self.new, G * D)}
        if self.past is not None:
            shapes |= {"pk": (B, G, self.past, D), "pv": (B, G, self.past, D)}
        found = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        return found | ({"mask": self.mask()} if self.padding else {})

    def mask(self) -> npt.NDArray[np.bool_]:
        """Return which keys are real, [B, 1, 1, T]."""
        mask = np.ones((B, 1, 1, self.total), np.bool_)
        mask[1, ..., :2] = False
        return mask

    def wanted(self, feeds: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Return what torch computes, by the definition of attention."""
        q, k, v = (torch.from_numpy(_heads(feeds[n])) for n in "qkv")
        if self.past is not None:
            k = torch.cat([torch.from_numpy(feeds["pk"]), k], 2)
            v = torch.cat([torch.from_numpy(feeds["pv"]), v], 2)
        k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
        scores = q @ k.mT / D**0.5
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        places = torch.arange(self.total)
        ahead = places - places[-self.new :, None]
        seen = torch.ones(B, 1, self.new, self.total, dtype=torch.bool)
        if self.causal:
            seen &= ahead <= 0
        if self.window:
            seen &= -ahead < self.window
        if self.padding:
            seen &= torch.from_numpy(self.mask())
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
        return np.asarray((weights @ v).transpose(1, 2).flatten(2).numpy())


def _heads(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return [B, heads, S, D] of [B, S, heads * D]."""
    return np.ascontiguousarray(array.reshape(*array.shape[:2], -1, D).swapaxes(1, 2))


CASES = [
    *(Heads(new, past) for new, past in itertools.product((1, 5), (None, 0, 3)) if new > 1 or past),
    Heads(padding=False),
    Heads(padding=False, past=None, causal=False),
    Heads(causal=False),
    Heads(past=None, causal=False, window=3),
    Heads(window=3),
    Heads(window=3, softcap=1.5, padding=False),
    Heads(softcap=1.5),
]


def real(heads: Heads, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the rows of queries that see a key: padding in front attends to nothing."""
    start = max(0, 2 - (heads.past or 0)) if heads.padding and heads.causal else 0
    return np.concatenate([array[0], array[1, start:]])


@pytest.mark.parametrize("heads", CASES, ids=str)
def test_attention_is_what_torch_computes(heads: Heads) -> None:
    feeds = heads.feeds()

    found = Evaluator(heads.program().model).run(feeds)

    np.testing.assert_allclose(
        real(heads, found["y"]), real(heads, heads.wanted(feeds)), rtol=0, atol=1e-6
    )
    assert found["present_key"].shape == (B, G, heads.total, D)


def test_onnxs_own_evaluator_is_wrong_where_ours_is_not() -> None:
    heads = Heads()  # if this fails, onnx was corrected: ours can go
    feeds = heads.feeds()

    found, *_ = ReferenceEvaluator(ir.to_proto(heads.program().model)).run(None, feeds)

    assert np.abs(real(heads, found) - real(heads, heads.wanted(feeds))).max() > 0.1


def test_a_mask_of_one_row_is_the_mask_of_all_rows() -> None:
    heads = Heads(padding=True)
    feeds = heads.feeds()
    made = heads.program()
    mask = next(value for value in made.graph.inputs if value.name == "mask")
    wanted = Evaluator(made.model).run(feeds)["y"]
    added = np.where(feeds["mask"], np.float32(0), np.float32(-np.inf))
    mask.type, mask.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["B", 1, 1, "T"])

    found = Evaluator(made.model).run({**feeds, "mask": added})["y"]
    whole = Evaluator(made.model).run({**feeds, "mask": np.repeat(added, heads.new, 2)})["y"]
    feeds["mask"] = np.arange(heads.total) > 0  # one axis: the same keys for every sequence
    one = Evaluator(made.model).run(feeds)["y"]
    wide = Evaluator(made.model).run({**feeds, "mask": np.tile(feeds["mask"], (heads.new, 1))})["y"]

    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(whole, wanted)
    np.testing.assert_array_equal(one, wide)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["RMSNormalization", "LayerNormalization"])
def test_a_norm_sums_in_float32_whatever_it_reads(kind: str, dtype: str) -> None:
    size = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = (np.random.default_rng(5).standard_normal((2, 3, 16)) * 1000).astype(size)
    scale = np.linspace(0.5, 2, 16).astype(size)
    bias = np.linspace(-1, 1, 16).astype(size)
    extra = f", {dtype}[16] bias" if kind == "LayerNormalization" else ""
    reads = "x, scale" + (", bias" if extra else "")
    made = program(
        f"main ({dtype}[2,3,16] x, {dtype}[16] scale{extra}) => ({dtype}[2,3,16] y)"
        f"{{ y = {kind} <epsilon = 0.00001> ({reads}) }}"
    )
    wide, as_torch = x.astype(np.float32), torch.from_numpy(x.astype(np.float32))
    if extra:
        norm = torch.nn.functional.layer_norm(as_torch, (16,), eps=1e-5).numpy()
    else:
        norm = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + 1e-5)
    wanted = norm * scale.astype(np.float32) + (bias.astype(np.float32) if extra else 0)

    found = Evaluator(made.model).run({"x": x, "scale": scale, "bias": bias})["y"]

    assert found.dtype == size
    digits = 3 * float(ml_dtypes.finfo(size).eps)  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(found.astype(np.float32), wanted, rtol=digits, atol=digits)


def test_a_norm_gives_its_mean_and_deviation() -> None:
    made = program(
        """main (float[2,16] x, float[16] scale) => (float[2,16] y, float[2,1] m, float[2,1] d)
        { y, m, d = LayerNormalization <axis = -1> (x, scale) }"""
    )
    x = np.random.default_rng(6).standard_normal((2, 16), np.float32)

    found = Evaluator(made.model).run({"x": x, "scale": np.ones(16, np.float32)})

    np.testing.assert_allclose(found["m"][:, 0], x.mean(1), atol=1e-6)
    np.testing.assert_allclose(found["d"][:, 0], 1 / np.sqrt(x.var(1) + 1e-5), rtol=1e-5)


def test_a_norm_of_another_precision_is_refused() -> None:
    made = program(
        "main (float[2,4] x, float[4] s) => (float[2,4] y) { y = RMSNormalization (x, s) }"
    )
    next(iter(made.graph)).attributes["stash_type"] = ir.AttrInt64("stash_type", 16)

    with pytest.raises(LlmoptError, match=r"stash_type=16: only float32"):
        Evaluator(made.model).run({"x": np.ones((2, 4), "f4"), "s": np.ones(4, "f4")})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_product_of_16_bits_is_summed_in_32(dtype: str) -> None:
    size = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rng = np.random.default_rng(7)
    a, b = (
        rng.standard_normal(shape, np.float32).astype(size) for shape in ((2, 3, 512), (512, 4))
    )
    made = program(
        f"main ({dtype}[2,3,512] a, {dtype}[512,4] b) => ({dtype}[2,3,4] y) {{ y = MatMul (a, b) }}"
    )
    wanted = (a.astype(np.float32) @ b.astype(np.float32)).astype(size)

    found = Evaluator(made.model).run({"a": a, "b": b})["y"]

    assert found.dtype == size
    np.testing.assert_array_equal(found, wanted)


HELD = """main (float[2] x) => (float[2] y, float[2] w)
<uint8[2] codes = {130, 126}, float scale = {0.5}, uint8 zero = {128}>
{ w = DequantizeLinear (codes, scale, zero)
  [half] h = Constant <value = float {2.0}> ()
  u = Mul (w, h)
  y = Add (x, u) }"""


def test_what_depends_on_weights_alone_is_computed_once() -> None:
    evaluator = Evaluator(program(HELD).model)

    assert [node.op_type for node in evaluator._evaluator.rt_nodes_] == ["Add"]
    assert evaluator._held.keys() == {"u", "w"}  # read later; the codes are not kept
    for step in (1.0, 2.0):
        found = evaluator.run({"x": np.full(2, step, np.float32)})
        assert found["y"].tolist() == [step + 2, step - 2]
    assert evaluator.run({"x": np.ones(2, np.float32)}, ["w"])["w"].tolist() == [1.0, -1.0]


def test_random_numbers_are_drawn_anew() -> None:
    made = program("main (float[2] x) => (float[64] y) { y = RandomNormal <shape = [64]> () }")
    evaluator = Evaluator(made.model)

    found = [evaluator.run({"x": np.ones(2, np.float32)})["y"] for _ in range(2)]

    assert not np.array_equal(found[0], found[1])


def branching() -> ir.Model:
    """Return a model whose weight is inside a branch and read from outside it."""
    made = program(
        """main (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}>
        { y = If (c) <
            then_branch = one () => (float[2] a) <float[2] z = {5, 6}> { a = Add (w, z) },
            else_branch = two () => (float[2] b) { b = Identity (x) }
        > }"""
    )
    return made.model


@pytest.mark.parametrize("saved", [False, True])
def test_branches_read_weights_around_and_inside_them(saved: bool, tmp_path: Path) -> None:
    model = branching()
    if saved:
        ir.save(model, tmp_path / "m.onnx", external_data="m.data")
        model = ir.load(tmp_path / "m.onnx")
    evaluator = Evaluator(model)
    x = np.array([7, 8], np.float32)

    for condition, wanted in ((1, [6.0, 8.0]), (0, [7.0, 8.0])):
        found = evaluator.run({"c": np.array(condition, np.bool_), "x": x})
        assert found["y"].tolist() == wanted


def test_what_nothing_computes_is_listed_together() -> None:
    made = program(
        """main (float[B,4] x) => (float[B,4] y, float[B,4] z, float[B,4] g)
    { [odd] y = Relu (x)\n [strange] z = Relu (x)\n g = Gelu (x) }"""
    )
    for node in list(made.graph)[:2]:
        node.op_type = "NoSuchOperator"
    strange = list(made.graph)[1]
    strange.domain = "com.example"

    assert lacking(made.model) == [
        "onnx's evaluator has no NoSuchOperator ('odd')",
        "onnx's evaluator has no com.example.NoSuchOperator ('strange')",
    ]
    with pytest.raises(LlmoptError, match="cannot run it"):
        Evaluator(made.model)


def test_operands_that_do_not_go_together_are_an_error_of_ours() -> None:
    made = program("main (float[N] x, float[M] z) => (float[K] y) { y = Add (x, z) }")

    with pytest.raises(LlmoptError, match="could not run the model"):
        Evaluator(made.model).run({"x": np.ones(2, "f4"), "z": np.ones(3, "f4")})


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        open_model(path)
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        open_model(path)
    onnx.save(ir.to_proto(program(HELD).model), path)
    assert open_model(path).outputs == ["y", "w"]
