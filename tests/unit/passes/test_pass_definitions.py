"""The default pipeline on tiny models of each kind: all is fused, equal, and then at rest."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pytest
from support.programs import defined, error_rel, inputs, operators, run

from llmopt.backends import find_backend
from llmopt.backends.onnxruntime import finish
from llmopt.backends.onnxruntime.lower_norms import LowerActivations
from llmopt.interface.arrays import Arrays
from llmopt.ir import dialect
from llmopt.ir import graph as g
from llmopt.ir.feeds import Case
from llmopt.ir.program import Program
from llmopt.passes import DEFAULT, PASSES
from llmopt.passes.pipeline import Pipeline, Ran

pytestmark = pytest.mark.xdist_group("definitions")  # of which each is traced once

TOLERANCE: Final = 2e-5  # float32, max|a-b| / max|b| over unpadded positions
VOCABULARY: Final = 31
_SIZES: Final[Mapping[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "pad_token_id": 1,
}
MODELS: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama": {**_SIZES, "model_type": "llama", "tie_word_embeddings": True},
    "gemma2": {
        **_SIZES,
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 4,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 3,
        "n_positions": 64,
    },
    "bert": {**_SIZES, "model_type": "bert", "hidden_act": "gelu", "type_vocab_size": 2},
}
# attentions, rotary embeddings, norms, merged projections
COUNTS: Final = {
    "llama": (2, 4, 5, 4),
    "gemma2": (2, 4, 9, 4),
    "gpt2": (2, 0, 5, 2),
    "bert": (2, 0, 5, 2),
}


@dataclass(frozen=True)
class Compiled:
    """A model at the stages that the tests compare."""

    name: str
    before: Program
    after: Program
    lowered: Program
    ran: tuple[Ran, ...]


@pytest.fixture(params=MODELS)
def compiled(request: pytest.FixtureRequest) -> Compiled:
    return _compiled(request.param)


@functools.cache  # in whichever order tests come
def _compiled(name: str) -> Compiled:
    before = defined(MODELS[name])
    ran: list[Ran] = []
    after = Pipeline.parse("default").run(before.clone(), lambda *step: ran.append(step[2]))
    lowered = Pipeline(find_backend("cpu").passes(None)).run(after.clone())
    finish(lowered.model)
    return Compiled(name, before, after, lowered, tuple(ran))


def test_everything_is_fused_and_nothing_missed(compiled: Compiled) -> None:
    ops = operators(compiled.after)
    norms = ops.count("RMSNormalization") + ops.count("LayerNormalization")
    found = (ops.count("Attention"), ops.count("RotaryEmbedding"), norms, ops.count("Split"))

    assert found == COUNTS[compiled.name]
    assert "Softmax" not in ops
    assert "Transpose" not in ops
    assert [miss.reason for ran in compiled.ran for miss in ran.missed] == []


def test_attention_keeps_its_heads_and_window(compiled: Compiled) -> None:
    nodes = g.nodes(compiled.after.graph, "Attention")
    heads = {(g.attribute(n, "q_num_heads", 0), g.attribute(n, "kv_num_heads", 0)) for n in nodes}
    windows = [g.attribute(n, "left_window_size", -1) for n in nodes]
    causal = {g.attribute(n, "is_causal", 0) for n in nodes}

    assert heads == {"gpt2": {(3, 3)}, "bert": {(6, 6)}}.get(compiled.name, {(6, 2)})
    assert windows == ([3, -1] if compiled.name == "gemma2" else [-1, -1])
    assert causal == {0 if compiled.name == "bert" else 1}


def test_the_program_keeps_the_dialect(compiled: Compiled) -> None:
    assert dialect.verify(compiled.after.model) == []
    assert dialect.invariants(compiled.after.model) == []


def test_lowering_leaves_no_attention_of_the_standard(compiled: Compiled) -> None:
    ops = operators(compiled.lowered)

    fused = "MultiHeadAttention" if compiled.name == "bert" else "GroupQueryAttention"
    assert ops.count(fused) == 2
    assert not {"Attention", "RotaryEmbedding", "Swish"} & {*ops}
    cache = compiled.lowered.facts.model.cache
    assert cache == ("none" if compiled.name == "bert" else "shared")


def test_the_numbers_stay_through_passes_and_lowering(compiled: Compiled) -> None:
    cases = [Case(1, 7), Case(3, 7, 0, "left"), Case(3, 7, 0, "right"), Case(1, 1)]
    if compiled.before.signature.has_cache:
        cases += [Case(3, 1, 9, "left"), Case(2, 1, 6, "right"), Case(1, 4, 5)]
    # Swish has no kernel before it is lowered
    after = Pipeline((LowerActivations(),)).run(compiled.after.clone())
    finish(after.model)
    for case in cases:
        given = inputs(compiled.before, case, VOCABULARY)
        want = run(compiled.before, given)
        for program in (after, compiled.lowered):
            got = run(program, given)
            assert list(got) == list(want)
            for name, array in want.items():
                # GroupQueryAttention counts positions of a left-padded prompt from its first slot
                if program is after or case.padding != "left" or not name.startswith("present"):
                    assert _error(name, got[name], array, case) < TOLERANCE, (name, case.label)


def test_steps_on_the_cache_of_a_left_padded_prompt_are_those_of_the_source(
    compiled: Compiled,
) -> None:
    if not compiled.before.signature.has_cache:
        assert compiled.name == "bert"
        return
    prompt = inputs(compiled.before, Case(3, 7, 0, "left"), VOCABULARY)
    steps = [_steps(program, prompt) for program in (compiled.before, compiled.lowered)]

    for want, got in zip(*steps, strict=True):
        assert error_rel(got, want) < TOLERANCE


def _steps(of: Program, prompt: Arrays) -> list[Any]:
    """Return the logits of a prompt and of five steps behind it."""
    given, logits = dict(prompt), []
    for token in range(5):
        result = run(of, given)
        logits.append(result["logits"])
        for name, array in result.items():
            given[name.replace("present", "past_key_values")] = array
        del given["logits"]
        given["input_ids"] = np.full((3, 1), token, np.int64)
        mask = given["attention_mask"]
        given["attention_mask"] = np.concatenate([mask, np.ones((3, 1), np.int64)], 1)
        given["position_ids"] = given["attention_mask"].sum(1, keepdims=True) - 1
    return logits


def _error(name: str, got: Any, want: Any, case: Case) -> float:
    real = case.mask() == 1
    if name.startswith("present"):
        return error_rel(got.swapaxes(1, 2), want.swapaxes(1, 2), real)
    new = real[:, case.past :]
    return error_rel(got, want, new[:, -want.shape[1] :])


def test_a_second_run_of_the_pipeline_changes_nothing(compiled: Compiled) -> None:
    again = compiled.after.clone()
    applied: dict[str, int] = {}

    def note(*step: Any) -> None:
        applied[step[2].name] = applied.get(step[2].name, 0) + step[2].applied

    Pipeline.parse("default").run(again, note)

    assert applied == dict.fromkeys(DEFAULT, 0)
    assert {*DEFAULT} <= {*PASSES}


def test_nothing_reads_a_weight_before_it_is_written(compiled: Compiled) -> None:
    unread = [v.const_value for v in compiled.after.graph.initializers.values()]

    assert sum(hasattr(tensor, "source") or hasattr(tensor, "parts") for tensor in unread) > 5
