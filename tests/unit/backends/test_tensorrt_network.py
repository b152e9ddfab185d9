"""The typed network computes what the dialect does, in the form that TensorRT's parser takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.programs import bound, error_rel, evaluate, inputs, operators, program, run
from support.schemes import scheme_of
from tokenizers import Tokenizer, models, pre_tokenizers

from llmopt.backends import find_backend
from llmopt.backends.base import Demand
from llmopt.backends.tensorrt import _write_network
from llmopt.backends.tensorrt.int4_weights import Int4Weights
from llmopt.backends.tensorrt.legalize_attention import LegalizeAttention, declined
from llmopt.backends.tensorrt.legalize_operators import LegalizeOperators
from llmopt.backends.tensorrt.network import problems_of, profiles_of
from llmopt.backends.tensorrt.quantize_static import QuantizeStatic
from llmopt.backends.tensorrt.typed_run import open_typed
from llmopt.errors import LlmoptError, UsageError
from llmopt.interface.arrays import Arrays
from llmopt.interface.facts import ModelFacts
from llmopt.ir.feeds import Case
from llmopt.ir.program import Program
from llmopt.passes.convert_float import ConvertFloat
from llmopt.passes.quantize_weights import QuantizeWeights
from llmopt.passes.rounding import rounding_of
from llmopt.quantization.schemes import Blockwise, parse_scheme
from llmopt.runtime.engines.tensorrt_recipe import NETWORK

TOLERANCE: Final = 1e-5  # float32, max|a-b| / max|b| over unpadded positions
PAD: Final = """   real2 = Cast <to = 9> (attention_mask)
   [padding_mask] real = Unsqueeze (real2, i12)
"""
CACHED: Final = """main (int64[B,S] input_ids, int64[B,T] attention_mask,
 float[B,S,64] q, float[B,S,32] k, float[B,S,32] v,
 float[B,2,P,16] past_key, float[B,2,P,16] past_value)
=> (float[B,S,64] y, float[B,2,T,16] present_key, float[B,2,T,16] present_value)
<int64[2] i12 = {{1,2}}>
{{
{pad}   y, present_key, present_value = Attention
   <q_num_heads = 4, kv_num_heads = 2{attributes}> (q, k, v, real, past_key, past_value)
}}"""
SELF: Final = """main (int64[B,S] attention_mask,
 float[B,S,64] q, float[B,S,64] k, float[B,S,64] v{more})
=> (float[B,S,64] y)
<int64[2] i12 = {{1,2}}>
{{
{pad}   y = Attention <q_num_heads = 4, kv_num_heads = 4{attributes}> (q, k, v{mask})
}}"""


def typed(made: Program, folder: Path, *passes: Any) -> tuple[Program, Any]:
    """Return a Program after passes, and what runs its network."""
    low = made.clone()
    for item in passes:
        item.run(low)
    _write_network(low, folder)
    return low, open_typed(folder / NETWORK)


def stepped(network: Any, whole: Arrays, prefill: int) -> Any:
    """Return y [B, S, E] of a prefill and one step for each token after it."""
    batch, total = whole["input_ids"].shape
    caches = {name: np.zeros((batch, 2, 64, 16), np.float32) for name in ("past_key", "past_value")}
    parts, start = [], 0
    for end in (prefill, *range(prefill + 1, total + 1)):
        step = {name: whole[name][:, start:end] for name in ("input_ids", "q", "k", "v")}
        step["attention_mask"] = whole["attention_mask"][:, :end]
        found = network({**step, **caches})
        caches = {name: found[name.replace("past", "present")] for name in caches}
        parts.append(found["y"])
        start = end
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(
    "attributes",
    [
        pytest.param(", is_causal = 1", id="causal"),
        pytest.param(", is_causal = 1, left_window_size = 2", id="window"),
        pytest.param(", is_causal = 1, softcap = 3.0, scale = 0.5", id="softcap"),
        pytest.param(", is_causal = 1, scale = 0.1", id="scale"),
    ],
)
@pytest.mark.parametrize("side", ["none", "left"])
def test_a_cache_of_fixed_capacity_equals_one_full_pass(
    attributes: str, side: str, tmp_path: Path
) -> None:
    made = program(CACHED.format(attributes=attributes, pad=PAD))
    low, network = typed(made, tmp_path, LegalizeAttention())
    case = Case(3, 9, 0, side)
    whole = inputs(made, case)

    want = run(made, whole)["y"]
    got = stepped(network, whole, 5)

    assert error_rel(got, want, case.mask() == 1) < TOLERANCE
    assert ("softcap" in attributes) == bool(declined(low))
    assert ("Attention" in operators(low)) != bool(declined(low))
    assert low.facts.model.cache == "shared"
    ports = {port.name: port.shape for port in low.signature.inputs}
    assert ports["past_key"] == ("B", 2, 64, 16)
    assert ports["attention_mask"] == ("B", 64)
    assert ports["write_indices"] == ("B",)


@pytest.mark.parametrize(
    ("attributes", "more", "mask", "kept"),
    [
        pytest.param("", "", ", real", False, id="padding"),
        pytest.param(", is_causal = 1", "", "", True, id="causal"),
        pytest.param(", is_causal = 1", "", ", real", False, id="causal and padding"),
        pytest.param(", left_window_size = 2, right_window_size = 1", "", ", real", False, id="w"),
        pytest.param(", is_causal = 1", ", float[B,4,S,S] bias", ", bias", False, id="bias"),
        pytest.param(", softcap = 2.0", ", float[B,4,S,S] bias", ", bias", False, id="cap, bias"),
        pytest.param(", softcap = 2.0", "", "", False, id="cap"),
    ],
)
def test_what_an_attention_sees_is_written_out(
    attributes: str, more: str, mask: str, kept: bool, tmp_path: Path
) -> None:
    made = program(SELF.format(attributes=attributes, more=more, mask=mask, pad=PAD))
    low, network = typed(made, tmp_path, LegalizeAttention())
    case = Case(3, 7, 0, "right")
    given = inputs(made, case)

    assert error_rel(network(given)["y"], run(made, given)["y"], case.mask() == 1) < TOLERANCE
    causal = [n for n in low.graph if n.attributes.get("is_causal")]
    assert bool(causal) == kept


def test_what_the_parser_ignores_is_gone(tmp_path: Path) -> None:
    made = program(CACHED.format(attributes=", is_causal = 1, left_window_size = 2", pad=PAD))
    typed(made, tmp_path, LegalizeAttention())

    proto = onnx.load(tmp_path / NETWORK)
    attention = next(node for node in proto.graph.node if node.op_type == "Attention")

    assert len(attention.input) == 4
    assert len(attention.output) == 1
    assert {a.name for a in attention.attribute} <= {"scale"}


def test_rotation_is_done_where_heads_are_apart(tmp_path: Path) -> None:
    text = """main (float[B,S,64] x, int64[B,S] position_ids) => (float[B,S,64] y)
    <float[64,8] cos = {%s}, float[64,8] sin = {%s}>
    { q = RotaryEmbedding <num_heads = 4> (x, cos, sin, position_ids)
      y = Attention <q_num_heads = 4, kv_num_heads = 4> (q, x, x) }"""
    angles = np.arange(64)[:, None] / 10.0 ** np.arange(8)
    tables = [", ".join(f"{n:.6f}" for n in f(angles).reshape(-1)) for f in (np.cos, np.sin)]
    made = program(text % tuple(tables))
    low, network = typed(made, tmp_path, LegalizeAttention())
    given: Arrays = {
        "x": np.random.default_rng(0).normal(size=(2, 5, 64)).astype(np.float32),
        "position_ids": np.arange(10).reshape(2, 5),
    }

    assert error_rel(network(given)["y"], run(made, given)["y"]) < TOLERANCE
    rotary = next(node for node in low.graph if node.op_type == "RotaryEmbedding")
    assert "num_heads" not in rotary.attributes


def test_a_default_becomes_an_input_and_swish_a_product(tmp_path: Path) -> None:
    made = program("main (float[N] x) => (float[N] y) { y = Swish <alpha = 1.5> (x) }")
    low, network = typed(made, tmp_path, LegalizeOperators())
    given = {"x": np.linspace(-3, 3, 7, dtype=np.float32)}

    assert operators(low) == ["Mul", "Sigmoid", "Mul"]
    assert error_rel(network(given)["y"], evaluate(made, given)["y"]) < TOLERANCE


def weighted(rows: int = 48, columns: int = 40) -> Program:
    """Return a lookup, a product with a bias and a tied head."""
    rng = np.random.default_rng(3)
    table = rng.normal(size=(rows, columns)).astype(np.float32)
    return bound(
        """main (int64[B,S] input_ids, float[48,40] table, float[40,40] inner)
        => (float[B,S,48] logits)
        { x = Gather (table, input_ids)
          h = MatMul (x, inner)
          turned = Transpose <perm = [1, 0]> (table)
          logits = MatMul (h, turned) }""",
        {"table": table, "inner": rng.normal(size=(columns, columns)).astype(np.float32)},
    )


def test_int4_weights_are_signed_and_exact(tmp_path: Path) -> None:
    made = weighted()
    QuantizeWeights(4, 16, positive=True).run(made)
    low, network = typed(made, tmp_path, Int4Weights())
    given = {"input_ids": np.arange(12).reshape(2, 6)}

    want = evaluate(made, given)["logits"]

    assert error_rel(network(given)["logits"], want) < TOLERANCE
    types = {tensor.data_type for tensor in onnx.load(tmp_path / NETWORK).graph.initializer}
    assert onnx.TensorProto.INT4 in types
    assert onnx.TensorProto.UINT4 not in types
    scales = [v for n, v in low.graph.initializers.items() if n.endswith(".scale")]
    assert scales
    assert all(np.all(v.const_value.numpy() > 0) for v in scales if v.const_value is not None)


def test_codes_that_tensorrt_has_not_stay_and_say_why() -> None:
    made = weighted()
    QuantizeWeights(8, 16).run(made)

    outcome = Int4Weights().run(made)

    assert not outcome.modified
    assert "not w4" in outcome.missed[0].reason


def test_w4_is_stored_with_positive_scales() -> None:
    backend = find_backend("tensorrt-rtx")

    assert backend.storage_scheme(Blockwise(block=64)) == Blockwise(
        block=64, positive=True, scale="float16"
    )
    assert backend.storage_scheme(parse_scheme("fp8")) == parse_scheme("fp8")
    assert backend.supports(Blockwise(block=64)) is None
    assert "no zero points" in (backend.supports(Blockwise(symmetric=False)) or "")


MLP: Final = """main (float[B,S,32] x, float[32,64] up, float[64,32] down) => (float[B,S,32] y)
{ h = MatMul (x, up)
  a = Relu (h)
  y = MatMul (a, down) }"""


def mlp() -> Program:
    rng = np.random.default_rng(4)
    shapes = {"up": (32, 64), "down": (64, 32)}
    return bound(MLP, {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()})


@pytest.mark.parametrize(("code", "close"), [("int8", 2e-2), ("float8", 8e-2)])
@pytest.mark.parametrize("percentile", [100.0, 99.9])
def test_products_of_8_bits_are_close_and_exact_when_asked(
    code: str, close: float, percentile: float, tmp_path: Path
) -> None:
    made = mlp()
    low, network = typed(made, tmp_path, QuantizeStatic(code, percentile))
    given = {"x": np.random.default_rng(5).normal(size=(2, 9, 32)).astype(np.float32)}

    want = run(made, given)["y"]
    exact = open_typed(tmp_path / NETWORK, exact=True)(given)["y"]

    assert operators(low).count("QuantizeLinear") == 2
    assert 1e-4 < error_rel(network(given)["y"], want) < close * 3
    assert 1e-4 < error_rel(exact, want) < close


def test_an_activation_with_outliers_stays_in_float() -> None:
    made = mlp()
    up = made.graph.initializers["up"].const_value
    assert up is not None
    wide = up.numpy().copy()
    wide[0, 0] = 3e4  # one hidden unit that dwarfs all others, for one in two tokens
    made = bound(MLP, {"up": wide, "down": np.ones((64, 32), np.float32)})

    outcome = QuantizeStatic("int8", smooth=False).run(made)

    assert outcome.applied == 1
    assert "loses" in outcome.missed[0].reason


def test_calibration_text_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    made = mlp()
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        QuantizeStatic("int8", calibration=str(tmp_path / "none.txt")).run(made)


NORM: Final = """main (float[B,4] x) => (float[B,4] y)
<float two = {2}, float tiny = {0.00001}, int64[1] last = {-1}>
{ squares = Pow (x, two)
  mean = ReduceMean <keepdims = 1> (squares, last)
  safe = Add (mean, tiny)
  root = Sqrt (safe)
  y = Div (x, root) }"""


def test_a_norm_of_1000_needs_its_island_of_float32() -> None:
    """Squares of 1000 are beyond float16: op by op, the islands decide whether it is right."""
    given = {"x": np.array([[1000.0, -1000.0, 500.0, 1000.0]], np.float32)}
    want = evaluate(program(NORM), given)["y"]
    found = {}
    for islands in ("sums", "none"):
        narrow = program(NORM)
        ConvertFloat("float16", islands).run(narrow)
        with np.errstate(over="ignore"):
            found[islands] = evaluate(narrow, given)["y"]

    assert error_rel(found["sums"], want) < 1e-3
    assert np.all(found["none"] == 0)  # x / infinity


STREAM: Final = """main (float[B,4] x, float[B,4] z) => (float[B,2] y)
<float[4] scale = {1, 1, 1, 1}, float[4,2] w = {1, 0, 0, 1, 1, 1, 0, 0}>
{ sum = Add (x, z)
  more = Add (sum, x)
  normed = RMSNormalization (more, scale)
  y = MatMul (normed, w) }"""


def test_sums_of_values_that_grow_need_float32() -> None:
    """What layers add up may pass 65504 though each part is small: as in Gemma and Qwen."""
    rows = {"x": [[30000.0, -30000.0, 9000.0, 1.0]], "z": [[9000.0, -9000.0, 1.0, 1.0]]}
    given = {name: np.array(row, np.float32) for name, row in rows.items()}
    want = evaluate(program(STREAM), given)["y"]
    found = {}
    for islands in ("residuals", "sums"):
        narrow = program(STREAM)
        ConvertFloat("float16", islands).run(narrow)
        with np.errstate(over="ignore", invalid="ignore"):
            found[islands] = evaluate(narrow, given)["y"]

    assert error_rel(found["residuals"], want) < 1e-3
    assert not np.all(np.isfinite(found["sums"])) or error_rel(found["sums"], want) > 0.1


def test_products_of_a_norm_stay_narrow() -> None:
    narrow = program(STREAM)

    ConvertFloat("float16", "residuals").run(narrow)

    dtypes = {node.op_type: node.inputs[0].dtype for node in narrow.graph if node.inputs[0]}
    assert dtypes["MatMul"] == ir.DataType.FLOAT16
    assert dtypes["RMSNormalization"] == dtypes["Add"] == ir.DataType.FLOAT


def test_bfloat16_is_proven_with_every_value_rounded(tmp_path: Path) -> None:
    made = mlp()
    _, network = typed(made, tmp_path, ConvertFloat("bfloat16"))
    given = {"x": np.random.default_rng(6).normal(size=(2, 5, 32)).astype(np.float32)}

    error = error_rel(network(given)["y"], run(made, given)["y"])

    assert 1e-3 < error < 2e-2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("main (float[N] x) => (float[N] y) { y = Det (x) }", "TensorRT has no Det"),
        (
            """main (int64[B,T] attention_mask,
                     float[B,2,P,16] past_key, float[B,2,P,16] past_value)
            => (float[B,2,P,16] y, int64[2] n)
            { y = Add (past_key, past_value)
              n = Shape (attention_mask) }""",
            "reads the cache outside attention",
        ),
    ],
)
def test_what_cannot_be_lowered_is_listed(text: str, problem: str) -> None:
    made = program(text) if "Det" not in text else program_unchecked(text)

    assert any(problem in each for each in problems_of(made))


def program_unchecked(text: str) -> Program:
    made = program(text.replace("Det", "Abs"))
    node = next(iter(made.graph))
    node.op_type = "Det"
    return made


def test_profiles_follow_batch_and_length() -> None:
    made = program(CACHED.format(attributes=", is_causal = 1", pad=PAD))
    LegalizeAttention().run(made)

    prefill, decode = profiles_of(made, batch=4, chunk=32)

    assert prefill.shapes["input_ids"].most == (4, 32)
    assert decode.shapes["input_ids"].most == (4, 1)
    assert decode.shapes["past_key"].most == (4, 2, 64, 16)
    assert prefill.shapes["attention_mask"].least == (1, 64)


def test_the_folder_of_a_deferred_engine_is_complete(tmp_path: Path) -> None:
    backend = find_backend("tensorrt")
    made = mlp()
    lowered = backend.write(made, tmp_path, Demand(2, defer_engine=True))

    assert lowered.entry == NETWORK
    assert {p.name for p in tmp_path.iterdir()} >= {NETWORK, "build.json", "golden.npz"}
    assert "built at the first load" in lowered.notes[-1]
    assert "sm" not in lowered.requires


def test_rounding_says_what_the_pass_does_to_weights(tmp_path: Path) -> None:
    made = mlp()
    change = rounding_of([QuantizeStatic("int8")], made)
    assert change is not None
    arrays = {name: made.graph.initializers[name].const_value for name in ("up", "down")}
    rounded = {n: change(n, t.numpy()) for n, t in arrays.items() if t is not None}
    low, _ = typed(made, tmp_path, QuantizeStatic("int8"))
    given = {"x": np.random.default_rng(8).normal(size=(2, 5, 32)).astype(np.float32)}

    exact = open_typed(tmp_path / NETWORK, exact=True)(given)["y"]

    assert "QuantizeLinear" in operators(low)
    assert error_rel(exact, run(bound(MLP, rounded), given)["y"]) < TOLERANCE
    assert change("other", given["x"]) is given["x"]


def tokens_model() -> Program:
    """Return a lookup and a product, with a tokenizer of words."""
    made = weighted()
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(48)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    facts = ModelFacts(max_length=64, vocabulary=48)
    made.learn(files={"tokenizer.json": tokenizer.to_str().encode()}, model=facts)
    return made


def test_scales_are_found_on_the_text_that_is_given(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3\n\nw4 w5\n")
    steps = []
    for path in ("", str(text)):
        made = tokens_model()
        outcome = QuantizeStatic("int8", calibration=path).run(made)
        assert outcome.applied == 1  # the head stays
        node = next(n for n in made.graph if n.op_type == "QuantizeLinear")
        scale = node.inputs[1]
        assert scale is not None
        assert scale.const_value is not None
        steps.append(float(scale.const_value.numpy()))

    assert steps[1] < steps[0]  # five words have smaller extremes than all of them


@pytest.mark.parametrize(("content", "problem"), [(None, "cannot be read"), ("\n", "is empty")])
def test_text_that_tells_nothing_is_refused(
    content: str | None, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_text(content)

    with pytest.raises(UsageError, match=problem):
        QuantizeStatic("int8", calibration=str(path)).run(tokens_model())


def test_a_mask_that_is_more_than_padding_cannot_meet_a_cache() -> None:
    text = CACHED.format(attributes=", is_causal = 1", pad=PAD).replace("[padding_mask]", "[other]")

    assert any("more than causality" in each for each in problems_of(program(text)))
    assert any("--max-length" in each for each in problems_of(program(text, limit=0)))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (None, ["legalize-attention", "legalize-operators"]),
        ("fp16", ["legalize-attention", "legalize-operators"]),
        ("w4{block=64}", ["int4-weights", "legalize-attention"]),
        ("fp8", ["quantize-static", "legalize-attention"]),
    ],
)
def test_each_scheme_has_its_passes(text: str | None, names: list[str]) -> None:
    backend = find_backend("tensorrt-rtx{sm=89,dtype=bfloat16}")
    scheme = scheme_of(text)

    assert [item.name for item in backend.passes(scheme)][: len(names)] == names
    assert "engine itself was not run" in backend.proven_by
    assert backend.tolerance(scheme) >= backend.tolerance(None)


def test_a_network_that_cannot_be_proven_is_told(tmp_path: Path) -> None:
    made = program("main (float[N] x) => (float[N] y) { y = Swish (x) }")

    with pytest.raises(LlmoptError, match=r"Swish.*--verify off"):
        typed(made, tmp_path)
