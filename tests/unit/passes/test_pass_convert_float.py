"""A narrower float: weights, values and caches become narrow, islands do not, and numbers hold."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from support.programs import apply, bound, evaluate, inputs, only, operators, program, reasons
from support.tiny_decoder import tiny_decoder

from llmopt.errors import UnsupportedModelError, UsageError
from llmopt.ir import weights
from llmopt.ir.feeds import Case
from llmopt.ir.program import Program
from llmopt.ir.saving import save_with_data
from llmopt.passes.convert_float import ConvertFloat, saturated
from llmopt.passes.quantize_weights import QuantizeWeights
from llmopt.passes.rounding import rounding_of

HALF: Final = np.float16
# RMS normalization, written out; the label of each value tells what it is
NORM: Final = """main (float[B,S,8] x) => (float[B,S,8] y)
<float eps = {1e-12}, int64[1] last = {-1}, float[8] scale = {1,1,1,1,2,2,2,2}>
{
   square = Mul (x, x)
   mean = ReduceMean (square, last)
   safe = Add (mean, eps)
   root = Sqrt (safe)
   normed = Div (x, root)
   y = Mul (normed, scale)
}"""


def converted(made: Program, option: str = "") -> Program:
    result = made.clone()
    apply(f"convert-float{option}", result)
    return result


def dtypes(of: Program) -> dict[str, str]:
    made = (value for node in of.graph for value in node.outputs)
    return {str(value.name): value.dtype.name for value in made if value.dtype is not None}


def rows(*values: float) -> np.ndarray:
    return np.array([[[value] * 8 for value in values]], np.float32)


def error(of: Program, x: np.ndarray, wanted: np.ndarray) -> float:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        found = evaluate(of, {"x": x})["y"]
        return float(np.abs(found - wanted).max()) if np.isfinite(found).all() else np.inf


@pytest.mark.parametrize("values", [(1000.0, -1000.0), (0.0, 1e-3), (30000.0,)])
def test_a_norm_written_out_is_right_with_islands_and_wrong_without(
    values: tuple[float, ...],
) -> None:
    made, x = program(NORM), rows(*values)
    wanted = evaluate(made, {"x": x})["y"]

    assert error(converted(made), x, wanted) <= 2e-3 * np.abs(wanted).max()
    assert error(converted(made, "{islands=none}"), x, wanted) > 0.5


def test_an_island_ends_where_it_meets_the_rest() -> None:
    after = converted(program(NORM))

    found = dtypes(after)
    wide = {name for name in ("square", "mean", "safe", "root", "normed") if found[name] == "FLOAT"}
    assert wide == {"square", "mean", "safe", "root", "normed"}
    assert operators(after).count("Cast") == 2  # to the scale, which is narrow, and to y
    assert only(after, "Sqrt").inputs[0] is only(after, "Add").outputs[0]


def test_a_second_run_changes_nothing() -> None:
    after = converted(program(NORM))

    assert apply("convert-float", after).applied == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_decoder_keeps_its_edges_but_for_the_cache(dtype: str) -> None:
    made = tiny_decoder()

    after = converted(made, f"{{dtype={dtype}}}")

    ports = {port.name: port.dtype for port in (*after.signature.inputs, *after.signature.outputs)}
    assert ports["logits"] == "float32"
    assert ports["input_ids"] == "int64"
    assert {ports[f"{side}_key_0"] for side in ("past", "present")} == {dtype}
    held = after.graph.initializers[f"table.{dtype}"]
    assert held.const_value is not None
    assert held.const_value.numpy().dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else HALF)
    values = {str(v.name): v.dtype for v in (*after.graph.inputs, *after.graph.outputs)}
    for port in (*after.signature.inputs, *after.signature.outputs):
        found = values[port.name]
        assert found is not None
        assert found.numpy().name == port.dtype


def test_positions_are_counted_in_float32() -> None:
    made = program("""main (int64[B,S] p, float[B,S,2] x) => (float[B,S,2] y)
<float[1,2] freq = {1, 0.01}, int64[1] two = {2}>
{
   up = Unsqueeze (p, two)
   position = Cast <to = 1> (up)
   angle = MatMul (position, freq)
   c = Cos (angle)
   y = Mul (x, c)
}""")
    given = {"p": np.array([[4097, 8191]]), "x": np.ones((1, 2, 2), np.float32)}

    found = evaluate(converted(made), given)["y"]

    assert np.abs(found - evaluate(made, given)["y"]).max() < 1e-3


def test_masks_stay_finite_so_that_a_row_of_padding_is_a_number() -> None:
    made = program("""main (float[B,S] x, bool[B,S] real) => (float[B,S] y)
<float nought = {0}, float low = {-3.4e38}, float lower = {-3.4e38}>
{
   bias = Where (real, nought, low)
   more = Add (bias, lower)
   masked = Add (x, more)
   y = Softmax (masked)
}""")
    given = {"x": np.ones((1, 4), np.float32), "real": np.zeros((1, 4), np.bool_)}

    assert np.isfinite(evaluate(converted(made), given)["y"]).all()


@pytest.mark.parametrize("dtype", [np.dtype(HALF), np.dtype(ml_dtypes.bfloat16)])
def test_constants_saturate_with_their_sign_and_infinity_stays(dtype: np.dtype) -> None:
    found = saturated(np.array([-np.inf, -3.4e38, 0.5, 3.4e38, np.inf], np.float32), dtype)

    wide = found.astype(np.float64)
    assert wide[[0, 2, 4]].tolist() == [-np.inf, 0.5, np.inf]
    assert wide[1] == -wide[3]
    assert np.isfinite(2 * wide[[1, 3]].astype(dtype)).all()


def test_a_weight_beyond_the_type_is_refused_by_name(tmp_path: Path) -> None:
    made = bound(
        "main (float[B,4] x, float[4,4] w) => (float[B,4] y) { y = MatMul (x, w) }",
        {"w": np.full((4, 4), 1e5, np.float32)},
    )

    with pytest.raises(UnsupportedModelError, match=r"'w' holds 100000, beyond float16.*bf16"):
        save_with_data(converted(made).model, tmp_path / "m.onnx", "m.data")
    assert operators(converted(made, "{dtype=bfloat16}")) == ["Cast", "MatMul", "Cast"]


def test_tied_weights_stay_tied() -> None:
    made = bound(
        """main (int64[B,S] input_ids, float[6,4] e) => (float[B,S,6] y) {
   x = Gather (e, input_ids)
   t = Transpose <perm = [1, 0]> (e)
   y = MatMul (x, t)
}""",
        {"e": np.eye(6, 4, dtype=np.float32)},
    )
    apply("fold-weights", made)

    after = converted(made)

    table = only(after, "Gather").inputs[0]
    head = only(after, "MatMul").inputs[1]
    assert table is not None
    assert head is not None
    assert table.const_value is not None
    assert head.const_value is not None
    assert weights.is_transpose(head.const_value)
    (rows_of_head,) = weights.parts_of(head.const_value)
    assert weights.identity(rows_of_head) == weights.identity(table.const_value)


def test_operators_of_float32_alone_keep_it() -> None:
    made = program("""main (float[1,N,4] x, float[1,1,N] score) => (int64[M,3] y)
<int64 most = {2}>
{
   boxes = Relu (x)
   y = NonMaxSuppression (boxes, score, most)
}""")

    after = converted(made)

    (before,) = [v for v in only(after, "NonMaxSuppression").inputs[:1] if v is not None]
    assert before.dtype == ir.DataType.FLOAT


def test_control_flow_is_left_with_a_reason() -> None:
    made = program("""main (float[B,4] x, bool c) => (float[B,4] y)
{
   y = If (c) <then_branch = a () => (float[B,4] t) { t = Relu (x) },
               else_branch = b () => (float[B,4] e) { e = Neg (x) }>
}""")

    outcome = ConvertFloat().run(made)

    assert outcome.applied == 0
    assert "control flow" in reasons(outcome)


@pytest.mark.parametrize("option", ["{dtype=float32}", "{islands=some}"])
def test_other_types_and_islands_are_refused(option: str) -> None:
    with pytest.raises(UsageError, match="choose"):
        converted(program(NORM), option)


def test_the_reference_is_rounded_as_the_artifact_is() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    made = bound(
        """main (float[B,16] x, float[16,8] w, float[8] s) => (float[B,8] y, float[8] z)
{
   y = MatMul (x, w)
   z = Exp (s)
}""",
        {"w": weight, "s": weight[0]},
    )

    plain = rounding_of([ConvertFloat()], made)
    assert plain is not None
    assert np.array_equal(plain("w", weight), weight.astype(HALF).astype(np.float32))
    assert np.array_equal(plain("s", weight[0]), weight[0])  # an island reads it

    quantize = QuantizeWeights(4, 16, scale="bfloat16")
    both = rounding_of([quantize, ConvertFloat("bfloat16")], made)
    assert both is not None
    block = both("w", weight)
    assert np.abs(block - weight).max() <= np.abs(weight).max() / 7
    steps = np.unique(np.round(np.diff(np.unique(np.abs(block[:, 0]))), 4))
    assert len(steps) <= 2  # one scale a column
    step = np.float32(steps[steps > 0].min())
    assert np.isclose(step, step.astype(ml_dtypes.bfloat16).astype(np.float32), rtol=1e-3)


def test_norms_become_islands_where_they_are_asked_for() -> None:
    made = program("""main (float[B,S,4] x) => (float[B,S,4] y) <float[4] w = {1,2,3,4}>
{
   a = Relu (x)
   b = RMSNormalization (a, w)
   y = Relu (b)
}""")

    assert dtypes(converted(made))["b"] == "FLOAT16"
    assert dtypes(converted(made, "{islands=norms}"))["b"] == "FLOAT"
    given = inputs(made, Case(2, 3))
    found = evaluate(converted(made, "{islands=norms}"), given)["y"]
    assert np.abs(found - evaluate(made, given)["y"]).max() < 1e-2
