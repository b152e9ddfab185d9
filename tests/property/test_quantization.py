"""Properties of quantization and of its measures that a list of cases cannot reach."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from llmopt.quantization.dynamic import dequantize_rows, quantize_columns, quantize_rows
from llmopt.quantization.evaluation import QualityMeter, kl_divergence, log_softmax
from llmopt.quantization.numerics import dequantize, quantize_blockwise
from llmopt.quantization.packing import pack, quantize_packed, unpack
from llmopt.quantization.schemes import Blockwise, parse_scheme

Matrix = NDArray[np.float32]

schemes = st.builds(
    Blockwise, st.sampled_from([2, 4, 6, 8]), st.sampled_from([16, 32, 64]), st.booleans()
)
scale_types = st.sampled_from([np.float32, np.float16])
values = st.floats(-60000, 60000, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e-30, 1e-7])
weights = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 70)),
    elements=values,
    fill=st.just(np.float32(0)),
)
rows = hnp.arrays(np.float32, st.tuples(st.just(2), st.integers(1, 9)), elements=values)

quick = settings(deadline=None, max_examples=60)


def steps(scheme: Blockwise, scale: NDArray[np.floating[Any]], columns: int) -> Matrix:
    """Return |scale| for each value of a weight."""
    spread: Matrix = np.abs(scale.astype(np.float32)).repeat(scheme.block, axis=1)[:, :columns]
    return spread


@quick
@given(weights, schemes, scale_types)
def test_values_inside_the_range_move_by_half_a_step_at_most(
    weight: Matrix, scheme: Blockwise, scale_dtype: type
) -> None:
    """Outside, where a symmetric block ends, they take the code at that end."""
    result = quantize_blockwise(weight, scheme, scale_dtype=scale_dtype)
    step = steps(scheme, result.scale, weight.shape[1])
    error = np.abs(dequantize(result) - weight)
    codes = result.codes[:, : weight.shape[1]]
    signed = (
        weight / result.scale.astype(np.float32).repeat(scheme.block, axis=1)[:, : weight.shape[1]]
    )
    above, below = signed > scheme.middle - 1, signed < -scheme.middle
    if not scheme.symmetric:
        above, below = np.zeros_like(above), np.zeros_like(below)
    inside = ~(above | below)
    assert (error[inside] <= 0.5001 * step[inside]).all()
    assert (codes[above] == scheme.levels - 1).all()
    assert (codes[below] == 0).all()
    assert scheme.searched or (error <= 1.001 * step).all()


@quick
@given(weights, schemes, scale_types)
def test_zero_is_exact(weight: Matrix, scheme: Blockwise, scale_dtype: type) -> None:
    back = dequantize(quantize_blockwise(weight, scheme, scale_dtype=scale_dtype))
    assert (back[weight == 0] == 0).all()


@quick
@given(weights, schemes, scale_types)
def test_scales_divide_and_are_never_zero(
    weight: Matrix, scheme: Blockwise, scale_dtype: type
) -> None:
    scale = quantize_blockwise(weight, scheme, scale_dtype=scale_dtype).scale
    assert scale.dtype == scale_dtype
    assert np.isfinite(scale).all()
    assert (scale != 0).all()
    assert scheme.symmetric or (scale > 0).all()


@quick
@given(weights, schemes.filter(lambda scheme: scheme.symmetric))
def test_quantizing_twice_changes_nothing(weight: Matrix, scheme: Blockwise) -> None:
    """Values on a symmetric grid stay where they are (a zero point may round to another grid)."""
    once = dequantize(quantize_blockwise(weight, scheme))
    twice = dequantize(quantize_blockwise(once, scheme))
    step = steps(scheme, quantize_blockwise(weight, scheme).scale, weight.shape[1])
    assert (np.abs(twice - once) <= 1e-3 * step).all()


@quick
@given(st.data(), schemes)
def test_unpack_is_the_inverse_of_pack(data: st.DataObject, scheme: Blockwise) -> None:
    weight = data.draw(weights)
    result = quantize_blockwise(weight, scheme)
    codes = data.draw(hnp.arrays(np.uint8, result.codes.shape))
    result.codes[:] = codes & (scheme.levels - 1)
    back = unpack(pack(result))
    np.testing.assert_array_equal(back.codes, result.codes)
    np.testing.assert_array_equal(back.scale, result.scale)
    assert (back.zero_point is None) == scheme.symmetric
    if back.zero_point is not None and result.zero_point is not None:
        np.testing.assert_array_equal(back.zero_point, result.zero_point)
    np.testing.assert_array_equal(
        dequantize(unpack(quantize_packed(weight, scheme))),
        dequantize(quantize_blockwise(weight, scheme)),
    )


@given(schemes.filter(lambda scheme: scheme.bits > 2))
def test_a_scheme_is_what_its_text_names(scheme: Blockwise) -> None:
    assert parse_scheme(str(scheme)) == scheme


@quick
@given(rows)
def test_rows_and_columns_in_int8_move_by_half_a_step(activations: Matrix) -> None:
    result = quantize_rows(activations)
    assert (np.abs(dequantize_rows(result) - activations) <= 0.5001 * result.scale).all()
    turned = quantize_columns(activations.T)
    np.testing.assert_array_equal(turned.scale, result.scale[:, 0])
    np.testing.assert_array_equal(turned.codes.T, result.codes.astype(int) - 128)


pairs = st.integers(1, 12).flatmap(
    lambda width: st.tuples(
        *[hnp.arrays(np.float32, (3, width), elements=st.floats(-50, 50, width=32))] * 2
    )
)


@quick
@given(pairs)
def test_divergence_is_never_negative_and_zero_for_equal_logits(
    pair: tuple[Matrix, Matrix],
) -> None:
    p, q = (log_softmax(part) for part in pair)
    assert (kl_divergence(p, q) >= 0).all()
    assert (kl_divergence(p, p) == 0).all()


@quick
@given(pairs, st.integers(-1000, 1000))
def test_a_constant_added_to_logits_changes_nothing(
    pair: tuple[Matrix, Matrix], shift: int
) -> None:
    reference, candidate = (np.round(part * 64) / 64 for part in pair)  # so that sums are exact
    one, other = QualityMeter(), QualityMeter()
    tokens = np.zeros(len(reference), np.int64)
    one.add(reference, candidate, tokens)
    other.add(reference, candidate + np.float32(shift), tokens)
    assert one.result() == other.result()
