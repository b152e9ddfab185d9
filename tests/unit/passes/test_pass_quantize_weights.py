"""A head of other bits than the layers, and the embedding that it is tied to."""

import numpy as np
import pytest
from support.tiny_sources import llama_folder

from llmopt.backends.tensorrt import TensorRt
from llmopt.errors import UsageError
from llmopt.frontend.base import Source, SourceOptions
from llmopt.frontend.source import open_source
from llmopt.ir import weights
from llmopt.ir.program import Program
from llmopt.passes.pipeline import Pipeline
from llmopt.passes.quantize_weights import QuantizeWeights, sources
from llmopt.passes.quantizers import quantizers
from llmopt.quantization.lazy import QuantizedPart, QuantizedWeight
from llmopt.quantization.numerics import dequantize
from llmopt.quantization.packing import unpack
from llmopt.quantization.schemes import Blockwise, parse_scheme

TABLE = "embed_tokens.weight"  # and the head, which is tied to it


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = llama_folder(tmp_path_factory.mktemp("source") / "tiny")
    made = open_source(str(folder), SourceOptions())
    Pipeline.parse("default").run(made.program)
    return made


def stored(program: Program) -> list[QuantizedWeight]:
    parts = (value.const_value for value in program.graph.initializers.values())
    return [part.of for part in parts if isinstance(part, QuantizedPart) and part.which == "codes"]


def bits_of(program: Program) -> dict[str, int]:
    """Return the bits of each weight by the name of its first source."""
    return {next(sources(weight.base)): weight.scheme.bits for weight in stored(program)}


def test_the_head_has_bits_of_its_own(source: Source) -> None:
    program = source.program.clone()
    QuantizeWeights(block=16, head=8).run(program)
    found = bits_of(program)
    assert found.pop(TABLE) == 8
    assert set(found.values()) == {4}
    QuantizeWeights(block=16, head=4).run(plain := source.program.clone())
    assert set(bits_of(plain).values()) == {4}


def test_the_source_is_rounded_likewise(source: Source) -> None:
    program = source.program.clone()
    step = QuantizeWeights(block=16, head=8)
    rounding = step.rounding(source.program, lambda _, array: array)
    step.run(program)
    for weight in stored(program):
        parts = [rounding(leaf.source, leaf.numpy()) for leaf in weights.leaves(weight.base)]
        found = dequantize(unpack(weight.packed()))
        np.testing.assert_array_equal(found, np.concatenate(parts))


def test_the_option_goes_from_text_to_the_pass() -> None:
    scheme = parse_scheme("w4{block=64,head=8}")
    assert str(scheme) == "w4{block=64,head=8}"
    assert quantizers(scheme, "sums") == (QuantizeWeights(4, 64, head=8),)
    with pytest.raises(UsageError, match=r"head=3: .*4, 6 or 8"):
        parse_scheme("w4{head=3}")
    for text in ("w4{head=w8}", "w4{head=}"):
        with pytest.raises(UsageError, match=r"option head='.*' of scheme w4: expected int"):
            parse_scheme(text)


def test_tensorrt_refuses_a_head_of_eight_bits() -> None:
    assert TensorRt().supports(Blockwise(4, head=8)) == (
        "no codes of 8 bits for the head; write w4 without head"
    )
