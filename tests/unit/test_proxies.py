"""What a run has to do, counted by hand and by `count_work`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.mixtures import CHOSEN, INNER, WIDE, mixture
from support.programs import bound, program
from support.tiny_decoder import tiny_decoder
from support.traced import Traced

from llmopt.backends.onnxruntime.lower_experts import LowerExperts
from llmopt.compiler.proxies import count_work
from llmopt.ir import graph as g
from llmopt.passes.pipeline import Pipeline
from llmopt.passes.quantize_experts import QuantizeExperts


def test_a_decoder_is_counted() -> None:
    made = tiny_decoder(keep=True)
    work = count_work(made)

    token, kept = work.products["token"], work.products["kept"]
    assert token.macs == {"float32": 32 * 64 + 32 * 32}
    assert token.weight_bytes == 4 * (32 * 64 + 32 * 32)
    assert kept.macs == {"float32": 32 * 11}
    assert work.attention_macs == 2 * 32
    assert work.cache_bytes == 2 * 16 * 4
    assert work.lookup_bytes == 4 * 32 + 2 * 2 * 4 * 8  # an embedding; cos and sin, for Q and K
    fixed = [g.weight(value) for value in made.graph.initializers.values()]
    constants = sum(tensor.nbytes for tensor in fixed if tensor is not None)
    assert work.other_bytes == constants - 4 * (32 * 64 + 32 * 32 + 32 * 11 + 11 * 32 + 2 * 64 * 8)
    assert sum(sum(c.values()) for c in work.operators.values()) == len(list(made.graph))


def test_attention_that_was_not_fused_counts_the_same() -> None:
    made = program("""m (float[B,2,S,16] q, float[B,2,16,T] k, float[B,2,T,16] v)
        => (float[B,2,S,16] y) { s = MatMul (q, k)  p = Softmax (s)  y = MatMul (p, v) }""")
    work = count_work(made)
    assert work.attention_macs == 2 * (2 * 16)
    assert work.products == {}


def test_one_row_for_each_sequence_is_counted_apart() -> None:
    text = """m (float[B,S,8] x, float[8,4] w) => (float[B,4] y)
        <int64[1] i1 = {1}> { first = ReduceMean <keepdims = 0> (x, i1)  y = MatMul (first, w) }"""
    work = count_work(bound(text, {"w": np.ones((8, 4), np.float32)}))
    assert work.products["sequence"].macs == Counter({"float32": 32})


def test_a_token_reads_the_experts_that_it_goes_to() -> None:
    macs = CHOSEN * (2 * INNER * WIDE + WIDE * INNER)
    plain = count_work(Pipeline((LowerExperts(),)).run(mixture()))
    assert plain.products["token"].macs == {"float32": macs}
    assert plain.products["token"].weight_bytes == 4 * macs

    rounded = Pipeline((QuantizeExperts(8, 16), LowerExperts())).run(mixture())
    work = count_work(rounded)
    assert work.products["token"].macs == {"int8": macs}
    assert work.products["token"].weight_bytes == macs + 4 * macs // 16  # codes and scales
    assert work.other_bytes == 0


@pytest.mark.xdist_group("traced")
@pytest.mark.parametrize(
    ("target", "product"),
    [("onnxruntime-cpu", "MatMulNBits"), pytest.param("tvm-cpu", "Linear", marks=pytest.mark.slow)],
)
def test_the_manifest_says_what_was_compiled(
    target: str, product: str, traced: Traced, tmp_path: Path
) -> None:
    artifact = traced.compiled(target, tmp_path / "out", quantize="w4{block=16}", verify="off")
    manifest = artifact.manifest

    assert manifest.work["operators"]["layers.0.attention.o_proj"][product] == 1
    assert manifest.work["operators"]["lm_head"][product] == 1
    assert set(manifest.work["products"]["kept"]["macs"]) == {"int8"}
    assert manifest.work["products"]["token"]["weight_bytes"] > 0
    fused = manifest.compiled["fusion"]["attention"]
    assert fused["expected"] == fused["fused"] > 0
    merged = {"name": "merge-qkv", "applied": fused["fused"], "missed": 0}
    assert merged in manifest.compiled["passes"]
