"""ONNX Runtime on CUDA: what is written has kernels there, and computes the same, padded or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Literal

import numpy as np
import onnx
import pytest
from support.programs import apply, error_rel, inputs, operators, program, run
from support.tiny_decoder import TEXT, VOCABULARY, tiny_decoder
from support.tiny_sources import bigram_file, llama_folder

import llmopt
from llmopt.artifact.manifest import Manifest
from llmopt.backends import find_backend
from llmopt.backends.base import Demand
from llmopt.backends.onnxruntime import ENTRY, finish
from llmopt.backends.onnxruntime.compact_rows import CompactRows
from llmopt.backends.onnxruntime.cuda import OnnxRuntimeCuda
from llmopt.backends.onnxruntime.kernels import (
    CUDA,
    KernelDef,
    KernelTable,
    cuda_kernels,
    since,
)
from llmopt.backends.onnxruntime.lower_attention import LowerAttention
from llmopt.errors import BackendUnavailableError, UnsupportedModelError, UsageError
from llmopt.interface.signature import Role
from llmopt.ir.dialect import verify
from llmopt.ir.feeds import Case
from llmopt.ir.program import Program
from llmopt.passes.pipeline import Pipeline
from llmopt.quantization.schemes import Blockwise, Cast
from llmopt.runtime import load

TOLERANCE: Final = 1e-5  # float32, max|a-b| / max|b| over unpadded positions
CASES: Final = [Case(3, 7, 0, side) for side in ("none", "left", "right")]


def turned(made: Program) -> tuple[Program, str]:
    """Return the Program with attention grouped by lengths, and what was missed."""
    low = made.clone()
    outcome = CompactRows().run(low)
    assert verify(low.model) == []
    missed = [*outcome.missed, *LowerAttention(bias=False).run(low).missed]
    finish(low.model)
    return low, "; ".join(miss.reason for miss in missed)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("case", [*CASES, Case(1, 5, 0, "none"), Case(2, 1, 0)])
def test_padded_rows_are_turned_round_and_back(case: Case, keep: bool) -> None:
    made = tiny_decoder(keep=keep)
    low, missed = turned(made)
    given = inputs(made, case, VOCABULARY) | ({"logits_to_keep": np.asarray(0)} if keep else {})

    found, wanted = run(low, given)["logits"], run(made, given)["logits"]

    assert missed == ""
    assert "GroupQueryAttention" in operators(low)
    assert error_rel(found, wanted, case.mask() == 1) < TOLERANCE
    attention = next(n for n in low.graph if n.op_type == "GroupQueryAttention")
    assert len(attention.inputs) == 9  # no positions, no bias


def test_heads_that_are_normed_apart_are_turned_as_well() -> None:
    apart = """   [heads] q4 = Reshape (q, by_head)
   qh = Transpose <perm = [0, 2, 1, 3]> (q4)
   qn = RMSNormalization (qh, narrow)
   qt = Transpose <perm = [0, 2, 1, 3]> (qn)
   qm = Reshape (qt, merged)
   qr = RotaryEmbedding <num_heads = 2> (qm, cos"""
    text = TEXT.replace("   qr = RotaryEmbedding <num_heads = 2> (q, cos", apart)
    known = "int64[4] by_head = {0,0,2,16}, int64[3] merged = {0,0,32}, float[16] narrow = {"
    text = text.replace("<int64[2] i12", f"<{known}{','.join(['2'] * 16)}}}, int64[2] i12")
    made = tiny_decoder(text=text)
    given = inputs(made, CASES[1], VOCABULARY)

    low, missed = turned(made)

    assert missed == ""
    found, wanted = run(low, given)["logits"], run(made, given)["logits"]
    assert error_rel(found, wanted, CASES[1].mask() == 1) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_steps_go_on_where_each_row_ended(side: str) -> None:
    made = tiny_decoder()
    low, _ = turned(made)
    case = Case(3, 7, 0, side)
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (3, 10))
    mask = np.concatenate([case.mask(), np.ones((3, 3), np.int64)], axis=1)
    place = np.maximum(mask.cumsum(1) - 1, 0)
    logits = {}
    for label, of in (("low", low), ("made", made)):
        names = ("past_key_0", "past_value_0")
        cache = dict.fromkeys(names, np.zeros((3, 1, 0, 16), np.float32))
        for start, end in ((0, 7), (7, 8), (8, 9), (9, 10)):
            step = {
                "input_ids": ids[:, start:end],
                "attention_mask": mask[:, :end],
                "position_ids": place[:, start:end],
            }
            found = run(of, step | cache)
            cache = {name: found[name.replace("past", "present")] for name in names}
            logits[label, end] = found["logits"]

    for end in (8, 9, 10):
        assert error_rel(logits["low", end], logits["made", end]) < TOLERANCE


def test_the_wish_for_last_logits_is_read_on_the_host() -> None:
    low, _ = turned(tiny_decoder(keep=True))

    mask = low.input(Role.MASK)
    cut = next(n for n in low.graph if n.op_type == "Slice" and n.inputs[0] is not mask)
    start = cut.inputs[1]
    assert start is not None
    last = start.producer()
    assert last is not None
    assert last.op_type == "Sub"
    nothing = last.inputs[0]
    assert nothing is not None
    sizes = nothing.producer()
    assert sizes is not None
    assert {value.producer().op_type for value in sizes.inputs} == {"Shape"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        pytest.param("Identity (sum)", "CumSum (sum, one)", "may mix tokens", id="sum over tokens"),
        pytest.param("Identity (sum)", "Add (sum, places)", "differ by position", id="by position"),
        pytest.param(", is_causal = 1", "", "is causal", id="not grouped"),
    ],
)
def test_what_looks_across_tokens_is_not_turned(old: str, new: str, reason: str) -> None:
    text = TEXT.replace("<is_causal = 1, ", "<").replace(
        "kv_num_heads = 1>", "kv_num_heads = 1, is_causal = 1>"
    )
    text = text.replace(old, new).replace("int64[2] i12", "int64 one = {1}, int64[2] i12")
    text = text.replace("float[64,8] sin)", "float[64,8] sin, float[1,S,32] places)")
    made = tiny_decoder(text=text)

    low, missed = turned(made)

    assert reason in missed
    assert "GroupQueryAttention" not in operators(low)
    assert low.facts.model.cache == "concat"


def test_a_program_without_padding_has_nothing_to_turn() -> None:
    made = tiny_decoder(text=TEXT.replace("v, real, past", "v, , past"))

    assert CompactRows().run(made).applied == 0
    low, missed = turned(made)
    assert missed == ""
    assert "GroupQueryAttention" in operators(low)


def test_the_table_says_where_it_is_from() -> None:
    table = cuda_kernels()

    assert "onnxruntime-gpu 1." in table.source
    assert table.provider == "CUDAExecutionProvider"
    assert ("com.microsoft", "GroupQueryAttention") in table.kernels
    assert json.loads(CUDA.read_text())["opset"] == 25


@pytest.mark.parametrize(
    ("kernel", "version", "letters", "fits"),
    [
        (KernelDef(13, None, {"T": frozenset({"float"})}), 13, {"T": "float"}, True),
        (KernelDef(13, None, {}), 14, {}, False),  # a later version may mean something else
        (KernelDef(9, 13, {}), 13, {}, True),
        (KernelDef(9, 12, {}), 13, {}, False),
        (KernelDef(13, None, {"T": frozenset({"float"})}), 13, {"T": "int8"}, False),
        (KernelDef(13, None, {}), 13, {"U": "int8"}, True),
    ],
)
def test_a_kernel_is_for_versions_and_types(
    kernel: KernelDef, version: int, letters: dict[str, str], fits: bool
) -> None:
    assert kernel.fits(version, letters) is fits


def test_every_node_without_a_kernel_is_listed_before_any_work() -> None:
    made = program("""main (float[B,4,4] x, int64[B,3] n) => (float[B] y, int64[B,1] z)
{
   [odd] y = Det (x)
   [places] z = ArgMax <axis = 1> (n)
}""")

    found = find_backend("gpu").check(made)

    assert found == [
        "no CUDAExecutionProvider kernel for Det ('odd')",
        "no CUDAExecutionProvider kernel for ArgMax ('places') with T int64",
    ]
    with pytest.raises(UnsupportedModelError, match="Det"):
        find_backend("gpu").write(made, Path(), Demand())


def test_operators_that_onnx_defines_by_others_need_no_kernel() -> None:
    made = program("main (float[B,4] x) => (float[B,4] y) { y = Swish (x) }")

    assert since("", "Swish") == 24
    assert since("", "NoSuchOperator") == 0
    assert cuda_kernels().lacking(made.graph) == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_lowered_decoder_has_a_kernel_for_every_node(
    dtype: Literal["float16", "bfloat16"], tmp_path: Path
) -> None:
    backend = OnnxRuntimeCuda(dtype=dtype)
    made = tiny_decoder(keep=True)
    assert backend.check(made) == []
    low = Pipeline(backend.passes(Blockwise(4))).run(made.clone())
    lowered = backend.write(low, tmp_path, Demand())
    given = inputs(made, CASES[1], VOCABULARY) | {"logits_to_keep": np.asarray(0)}

    found = backend.open(tmp_path / lowered.entry, exact=True)(given)["logits"]

    wanted = run(made, given)["logits"]
    assert error_rel(found, wanted, CASES[1].mask() == 1) < 0.05
    config = json.loads((tmp_path / "genai_config.json").read_text())
    (provider,) = config["model"]["decoder"]["session_options"]["provider_options"]
    assert provider["cuda"]["enable_cuda_graph"] == "0"
    kinds = {p.name: p.dtype for p in low.signature.inputs}
    assert kinds["past_key_0"] == dtype


def test_options_and_schemes() -> None:
    made = tiny_decoder()
    assert find_backend("gpu").default_scheme == Cast("float16")
    assert find_backend("gpu{dtype=bfloat16}").default_scheme == Cast("bfloat16")
    resolved, notes = find_backend("gpu").resolved(made, Cast("bfloat16"))
    assert resolved.target == "onnxruntime-cuda{dtype=bfloat16}"
    assert notes == ()
    assert find_backend("gpu").resolved(made, Blockwise(4))[0] == find_backend("gpu")
    assert "float32" in resolved.proven_by
    assert resolved.available().builds == ""
    for wrong in ("dtype=float32", "graph=maybe"):
        with pytest.raises(UsageError, match="onnxruntime-cuda"):
            find_backend(f"gpu{{{wrong}}}")


@pytest.mark.parametrize("scheme", ["fp16", "bf16", "w8"])
def test_a_file_is_compiled_in_sixteen_bits(scheme: str, tmp_path: Path) -> None:
    source = bigram_file(tmp_path / "bigram.onnx")

    artifact = llmopt.compile(
        source, target="gpu", output=tmp_path / "out", quantize=None if scheme == "fp16" else scheme
    )

    manifest = Manifest.read(artifact.path)
    stored = "w8{scale=float16}" if scheme == "w8" else scheme
    assert manifest.precision == {"weights": stored}
    assert manifest.verification["worst_error_rel"] < 1e-2
    assert manifest.verification["tolerance"] == (2e-2 if scheme == "bf16" else 5e-3)
    assert ("dtype=bfloat16" in manifest.target) is (scheme == "bf16")


@pytest.mark.slow
def test_a_llama_in_sixteen_bits_from_folder_to_artifact(tmp_path: Path) -> None:
    heads = {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    source = llama_folder(tmp_path / "source", **heads)

    artifact = llmopt.compile(source, target="gpu{graph=true}", output=tmp_path / "out")

    manifest = Manifest.read(artifact.path)
    assert manifest.target == "onnxruntime-cuda{graph=true}"
    assert manifest.precision == {"weights": "fp16"}
    assert manifest.verification["worst_error_rel"] < 5e-3
    assert "float32" in manifest.verification["proven_by"]
    assert manifest.quality["kl_mean"] < 1e-4
    assert manifest.model.cache == "shared"
    kinds = {
        t.data_type
        for t in onnx.load(artifact.path / ENTRY, load_external_data=False).graph.initializer
    }
    assert onnx.TensorProto.FLOAT not in kinds
    with pytest.raises(BackendUnavailableError, match="pip install onnxruntime-gpu") as caught:
        load(artifact.path)
    assert caught.value.exit_code == 3


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [["", "Erf", 13, None, {"T": ["float"]}], ["com.microsoft", "Two", 1, None, {}]]
    schemas = [["com.microsoft", "Two", ["T"], ["T", "tensor(int64)"], True]]
    data = {"provider": "Some", "source": "a test", "kernels": rows, "schemas": schemas}
    (tmp_path / "table.json").write_text(json.dumps(data))

    table = KernelTable.read(tmp_path / "table.json")

    assert table.kernels["", "Erf"] == [KernelDef(13, None, {"T": frozenset({"float"})})]
    formals = table.formals["com.microsoft", "Two"]
    assert (formals.input(5), formals.output(1)) == ("T", "tensor(int64)")
    made = program("main (float16[B] x) => (float16[B] y) { [odd] y = Erf (x) }")
    assert table.lacking(made.graph) == ["no Some kernel for Erf ('odd') with T float16"]


def test_lowering_passes_are_applied_once() -> None:
    made = tiny_decoder()
    apply("canonicalize", made)
    CompactRows().run(made)

    assert CompactRows().run(made).applied == 0
