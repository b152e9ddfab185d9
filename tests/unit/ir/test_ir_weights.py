"""Weights are read when they are asked for, and remember what they were made from."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llmopt.ir import weights
from llmopt.ir.weights import Leaf


class Counted:
    """A source that counts how often it is read."""

    def __init__(self, *shape: int, seed: int = 0) -> None:
        self.array = np.random.default_rng(seed).standard_normal(shape, np.float32)
        self.reads = 0

    def leaf(self, name: str) -> Leaf:
        """Return the array as a weight of the source."""

        def read() -> npt.NDArray[np.float32]:
            self.reads += 1
            return self.array

        return Leaf(name, read, ir.DataType.FLOAT, self.array.shape)


def test_nothing_is_read_until_numbers_are_asked_for() -> None:
    source = Counted(3, 2)
    joined = weights.concatenated([weights.transposed(source.leaf("w"))] * 2, 1)
    cast = weights.cast(joined, ir.DataType.FLOAT16)

    assert source.reads == 0
    assert list(cast.shape) == [2, 6]
    want = np.concatenate([source.array.T] * 2, 1).astype(np.float16)
    np.testing.assert_array_equal(cast.numpy(), want)
    assert source.reads == 2


def test_a_transpose_twice_is_the_source() -> None:
    leaf = Counted(3, 2).leaf("w")

    assert weights.transposed(weights.transposed(leaf)) is leaf
    assert weights.transposed(leaf, [0, 1]) is leaf
    assert weights.cast(leaf, ir.DataType.FLOAT) is leaf
    assert weights.concatenated([leaf], 0) is leaf


def test_joined_columns_are_the_transpose_of_joined_rows() -> None:
    first, second = Counted(3, 2), Counted(4, 2, seed=1)
    joined = weights.concatenated(
        [weights.transposed(first.leaf("a")), weights.transposed(second.leaf("b"))], 1
    )

    assert weights.is_transpose(joined)
    assert [leaf.source for leaf in weights.leaves(joined)] == ["a", "b"]
    np.testing.assert_array_equal(joined.numpy(), np.concatenate([first.array, second.array]).T)


def test_other_axes_are_reordered_too() -> None:
    source = Counted(2, 3, 4)
    turned = weights.transposed(source.leaf("w"), [2, 0, 1])

    assert not weights.is_transpose(turned)
    np.testing.assert_array_equal(turned.numpy(), source.array.transpose(2, 0, 1))


def test_identity_tells_equal_weights_from_equal_shapes() -> None:
    a, again, b = Counted(2, 2).leaf("a"), Counted(2, 2).leaf("a"), Counted(2, 2).leaf("b")
    half = weights.cast(a, ir.DataType.FLOAT16)
    other = ir.tensor(np.zeros((2, 2), np.float32))

    assert weights.identity(weights.transposed(a)) == weights.identity(weights.transposed(again))
    assert weights.identity(a) != weights.identity(b)
    assert weights.identity(a) != weights.identity(half)
    assert weights.identity(weights.transposed(a)) != weights.identity(a)
    assert weights.identity(other) != weights.identity(ir.tensor(np.zeros((2, 2), np.float32)))
    assert weights.parts_of(other) == ()


def test_columns_in_another_order_are_rows_of_the_source_in_it() -> None:
    source = Counted(3, 2)
    order = np.array([2, 0, 1])
    taken = weights.taken(weights.transposed(source.leaf("w")), order, 1)

    assert source.reads == 0
    assert weights.is_transpose(taken)
    np.testing.assert_array_equal(taken.numpy(), source.array[order].T)
    other = weights.taken(weights.transposed(source.leaf("w")), order[::-1], 1)
    assert weights.identity(taken) != weights.identity(other)
    same = weights.taken(weights.transposed(source.leaf("w")), order.copy(), 1)
    assert weights.identity(taken) == weights.identity(same)
