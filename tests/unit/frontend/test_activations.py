"""Mean squares of activations: what a product with each weight is fed, by the weight's name."""

from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_sources import llama_folder
from torch import Tensor, nn

from llmopt.compiler import calibration
from llmopt.compiler.calibration import measure_activations
from llmopt.frontend.activations import LEAST, mean_squares
from llmopt.frontend.base import Source, SourceOptions
from llmopt.frontend.reference import ModuleReference
from llmopt.frontend.source import open_source
from llmopt.interface.arrays import Arrays
from llmopt.ir import weights
from llmopt.ir.feeds import Case
from llmopt.passes.pipeline import Pipeline
from llmopt.passes.quantize_weights import QuantizeWeights, candidates, importance, sources
from llmopt.quantization.lazy import QuantizedPart
from llmopt.quantization.numerics import dequantize
from llmopt.quantization.packing import unpack

pytestmark = pytest.mark.xdist_group("activations")  # measured once


class Two(nn.Module):
    """A product of what comes in, and one of twice that; a table that nothing multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(4, 5, bias=False)
        self.table = nn.Embedding(4, 4)

    def forward(self, x: Tensor) -> Any:
        """Return the products of x [.., 4]."""
        scaled = 2 * x * torch.tensor([1.0, 4.0, 1.0, 1.0])
        return self.first(x), self.second(scaled), x @ self.table.weight


def reference(module: nn.Module) -> ModuleReference:
    return ModuleReference(module, ["x"], ["a", "b", "c"], positional=1)


def feed(*columns: float) -> Arrays:
    return {"x": np.tile(np.array(columns, np.float32), (1, 6, 1))}


def test_each_weight_gets_the_mean_square_of_what_meets_its_columns() -> None:
    module = Two()
    found = mean_squares(reference(module), [feed(1, 2, 1, 2), feed(1, 2, 1, 2)])
    assert set(found) == {"first.weight", "second.weight"}
    assert found["first.weight"].dtype == np.float32
    for name, squares in (("first.weight", [1, 4, 1, 4]), ("second.weight", [1, 64, 1, 4])):
        wanted = np.array(squares) / np.mean(squares)
        np.testing.assert_allclose(found[name], wanted, rtol=2 ** (1 / 8) - 1)
    assert not any("llmopt_name" in vars(parameter) for parameter in module.parameters())


def test_columns_that_met_nothing_keep_a_little() -> None:
    found = mean_squares(reference(Two()), [feed(0, 0, 0, 4)])["first.weight"]
    assert found[0] == pytest.approx(LEAST, rel=0.1)
    nothing = mean_squares(reference(Two()), [feed(0, 0, 0, 0)])["first.weight"]
    assert (nothing > 0).all()


def test_the_last_bits_of_a_sum_decide_nothing() -> None:
    one, other = (
        mean_squares(reference(Two()), [feed(1, 2, 3, 4 * off)])["first.weight"]
        for off in (1, 1 + 1e-6)
    )
    np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = llama_folder(tmp_path_factory.mktemp("source") / "tiny")
    made = open_source(str(folder), SourceOptions())
    Pipeline.parse("default").run(made.program)
    measure_activations(made)
    return made


def test_every_weight_of_a_decoder_is_found_merged_ones_and_a_tied_head_too(source: Source) -> None:
    multiplied = [base for node, _, base in candidates(source.program) if node.op_type == "MatMul"]
    assert multiplied
    for base in multiplied:
        found = importance(source.program, base)
        assert found is not None
        for name in sources(base):
            np.testing.assert_array_equal(source.program.facts.activations[name], found)


def test_what_is_known_is_not_measured_again(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = source.program.facts.activations
    monkeypatch.setattr(calibration, "CASE", Case(1, 5, seed=3))
    measure_activations(source)
    assert source.program.facts.activations is known


def test_weights_are_rounded_for_verification_as_they_are_stored(source: Source) -> None:
    step, bare = QuantizeWeights(block=16), source.program.clone()
    bare.learn(activations={})
    without = step.rounding(bare, lambda _, array: array)
    rounding = step.rounding(source.program, lambda _, array: array)
    quantized = source.program.clone()
    step.run(quantized)
    stored = {
        value.const_value.of
        for value in quantized.graph.initializers.values()
        if isinstance(value.const_value, QuantizedPart)
    }
    changed = 0
    for weight in stored:
        parts = [(leaf.source, leaf.numpy()) for leaf in weights.leaves(weight.base)]
        found = dequantize(unpack(weight.packed()))
        wanted = np.concatenate([rounding(*part) for part in parts])
        np.testing.assert_array_equal(found, wanted)
        changed += int((np.concatenate([without(*part) for part in parts]) != wanted).any())
    assert changed > len(stored) // 2
