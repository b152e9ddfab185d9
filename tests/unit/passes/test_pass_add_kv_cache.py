"""A decoder without a cache gets one that is proven, or is refused at the node in the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from support.onnx_decoder import COUNT, HIDDEN, VOCABULARY, decoder
from support.programs import apply, evaluate, operators

from llmopt.errors import NotIncrementalError
from llmopt.interface.signature import Port, Role, Signature
from llmopt.ir.feeds import positions
from llmopt.ir.program import Program
from llmopt.verification import decode, relative_error

Ints = npt.NDArray[np.int64]
ALIBI = {
    "row": "row = Unsqueeze (place, at1)\napart = Sub (row, columns)",
    "column": "column = Unsqueeze (place, at0)",
    "later": "later = Greater (column, row)\nfar = Cast <to = 1> (apart)\nbias = Mul (far, slope)",
    "masked": "biased = Add (scores, bias)\nmasked = Where (later, low, biased)",
}
SPELLINGS: Mapping[str, Mapping[str, str]] = {
    "as it is": {},
    "subtracted": {
        "masked": "much = Cast <to = 1> (later)\nfar = Mul (much, low)\nmasked = Add (scores, far)"
    },
    "alibi": ALIBI | {"row": "columns = Unsqueeze (place, at0)\n" + ALIBI["row"]},
    "guarded": {
        "weights": "soft = Softmax <axis = -1> (masked)\nnan = IsNaN (soft)\n"
        "weights = Where (nan, nought, soft)",
        "count1": "nought = Constant <value = float {0.0}> ()\n" + COUNT,
    },
    "a convolution of one token": {
        "extra": "turn = Transpose <perm = [0,2,1]> (x)\n"
        "wide = Conv <kernel_shape = [1]> (turn, taps)\nback = Transpose <perm = [0,2,1]> (wide)\n"
        "sums = ReduceSum (back, at2)\ny = Add (x, sums)"
    },
}


def step_by_step(made: Program, tokens: Ints, mask: Ints) -> npt.NDArray[np.float32]:
    batch = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions(mask)}
    return decode(made.signature, lambda given: evaluate(made, given), batch, 5)


@pytest.mark.parametrize("fused", [False, True], ids=["written out", "fused"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_prefill_and_steps_give_what_one_pass_does(spelling: str, *, fused: bool) -> None:
    plain, made = decoder(SPELLINGS[spelling]), decoder(SPELLINGS[spelling])
    if fused:
        apply("fuse-attention", made)

    assert apply("add-kv-cache", made).missed == []

    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, 9))
    mask = np.ones_like(tokens)
    mask[1, :3] = 0
    found = step_by_step(made, tokens, mask)
    first = evaluate(plain, {"input_ids": tokens[:1]})["logits"]
    second = evaluate(plain, {"input_ids": tokens[1:, 3:]})["logits"]
    assert relative_error(found[:1], first) <= 1e-5
    assert relative_error(found[1:, 3:], second) <= 1e-5
    assert ("Attention" in operators(made)) is fused
    assert apply("add-kv-cache", made).applied == 0


def test_the_signature_is_that_of_every_decoder() -> None:
    made = decoder()
    apply("add-kv-cache", made)

    assert [(p.name, p.shape) for p in made.signature.inputs] == [
        ("input_ids", ("B", "S")),
        ("attention_mask", ("B", "T")),
        ("position_ids", ("B", "S")),
        ("past_key_values.0.key", ("B", 2, "P", 4)),
        ("past_key_values.0.value", ("B", 2, "P", 4)),
        ("logits_to_keep", ()),
    ]
    assert [(p.name, p.shape) for p in made.signature.outputs] == [
        ("logits", ("B", "K", VOCABULARY)),
        ("present.0.key", ("B", 2, "T", 4)),
        ("present.0.value", ("B", 2, "T", 4)),
    ]
    model = made.facts.model
    assert (model.layers, model.kv_heads, model.head_width, model.cache) == (1, 2, 4, "concat")


REFUSED: Mapping[str, tuple[Mapping[str, str], str, str]] = {
    "nothing masks": (
        {"masked": "masked = Identity (scores)"},
        "weights",
        "lets a token see later ones",
    ),
    "the mask is of earlier tokens": (
        {"later": "later = Less (column, row)"},
        "weights",
        "lets a token see later ones",
    ),
    "the mask is too weak": (
        {"masked": "masked = Where (later, slope, scores)"},
        "weights",
        "later",
    ),
    "a mean over tokens": (
        {"extra": "mean = ReduceMean (x, at1)\ny = Add (x, mean)"},
        "mean",
        "mixes tokens",
    ),
    "a sum of earlier tokens": (
        {"extra": "y = CumSum (x, one)"},
        "y",
        "sums over all earlier tokens",
    ),
    "a convolution over time": (
        {
            "extra": "turn = Transpose <perm = [0,2,1]> (x)\n"
            "near = Conv <kernel_shape = [3], pads = [1,1]> (turn, window)\n"
            "back = Transpose <perm = [0,2,1]> (near)\nsums = ReduceSum (back, at2)\n"
            "y = Add (x, sums)"
        },
        "near",
        "mixes tokens",
    ),
    "a mean over the batch": (
        {"extra": "mean = ReduceMean (x, at0)\ny = Sub (x, mean)"},
        "mean",
        "mixes the sequences of a batch",
    ),
    "the token before": (
        {"extra": "mixed = Concat <axis = 1> (x, x)\ny = Slice (mixed, at0, count1, at1)"},
        "mixed",
        "mixes tokens",
    ),
    "positions from the end": (
        {"place": "forth = Range (zero, count, one)\nplace = Sub (count, forth)"},
        "x",
        "another one in a longer sequence",
    ),
    "a factor of how many there are": (
        {"scores": "size = Cast <to = 1> (count)\nscores = Div (product, size)"},
        "scores",
        "another one in a longer sequence",
    ),
    "a mask of tokens": (
        {
            "masked": "pad = Equal (input_ids, zero)\npad2 = Unsqueeze (pad, at12)\n"
            "seen = Where (later, low, scores)\nmasked = Where (pad2, low, seen)"
        },
        "masked",
        "aligns",
    ),
    "attention without a softmax": (
        {"weights": "weights = Sigmoid (masked)"},
        "sum",
        "no masked softmax made weights",
    ),
    "linear attention": (
        {
            "product": "kv = MatMul (kt, vt)",
            "scores": "",
            "masked": "",
            "weights": "",
            "later": "",
            "sum": "sum = MatMul (qt, kv)",
        },
        "kv",
        "sums over tokens",
    ),
    "an unknown operator": (
        {"extra": "pool = GlobalAveragePool (x)\ny = Add (x, pool)"},
        "pool",
        "not known to treat each token",
    ),
    "no attention at all": (
        {
            **dict.fromkeys(["product", "scores", "masked", "weights", "later"], ""),
            "sum": "sum = Identity (vt)",
        },
        "logits",
        "nothing to keep",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_proven_is_refused_by_name(case: str) -> None:
    changed, node, reason = REFUSED[case]
    made = decoder(changed)
    before = str(made.graph)

    (miss,) = apply("add-kv-cache", made).missed

    assert miss.node == node
    assert reason in miss.reason
    assert str(made.graph) == before
    assert not made.signature.has_cache
    with pytest.raises(NotIncrementalError, match=f"'{node}'.*{reason}.*,-add-kv-cache"):
        apply("add-kv-cache{require=true}", made)


def test_other_inputs_and_outputs_are_refused() -> None:
    types = decoder({"extra": "y = Mul (x, gate)"}, extra=", float[B,S,1] gate")
    assert apply("add-kv-cache", types).missed[0].node == "gate"
    other = decoder()
    port = Port("hidden", Role.HIDDEN, "float32", ("B", "S", HIDDEN))
    other.signature = Signature(other.signature.inputs, (*other.signature.outputs, port))
    assert apply("add-kv-cache", other).missed[0].node == "hidden"


def test_what_does_not_generate_is_left_alone_unless_it_is_required() -> None:
    made = decoder({"masked": "masked = Identity (scores)"})
    made.learn(task="encode")
    assert (apply("add-kv-cache", made).applied, apply("add-kv-cache", made).missed) == (0, [])
    with pytest.raises(NotIncrementalError, match="later ones"):
        apply("add-kv-cache{require=true}", made)


def test_names_of_the_source_give_way_to_those_of_runners() -> None:
    made = decoder()
    made.graph.inputs[0].name = "idx"
    renamed = replace(made.signature.inputs[0], name="idx")
    made.signature = Signature((renamed, *made.signature.inputs[1:]), made.signature.outputs)
    apply("add-kv-cache", made)
    assert [value.name for value in made.graph.inputs[:1]] == ["input_ids"]
