"""Attention written out at random is fused, means what it says, and computes the same.

``LLMOPT_FUZZ=1000 pytest tests/fuzz`` looks longer; ``LLMOPT_FUZZ_SEED=7`` begins elsewhere. A
failure prints the spelling: add it to the table in ``test_pass_attention.py``.
"""

from __future__ import annotations

import os
from typing import Final

import numpy as np
import pytest
from support.programs import error_rel, evaluate, inputs, only, operators, program, run
from support.spellings import Spelling, random_spelling, text

from llmopt.backends.onnxruntime.lower_attention import LowerAttention
from llmopt.ir import graph as g
from llmopt.ir.feeds import Case
from llmopt.passes.pipeline import Pipeline

COUNT: Final = int(os.environ.get("LLMOPT_FUZZ", "30"))
FIRST: Final = int(os.environ.get("LLMOPT_FUZZ_SEED", "0"))
PASSES: Final = "canonicalize,fuse-attention,raise-attention,cancel-transposes,canonicalize"
TOLERANCE: Final = 2e-5  # float32, max|a-b| / max|b| over unpadded positions


def random_case(spelling: Spelling, seed: int) -> Case:
    rng = np.random.default_rng([seed, 1])
    past = int(rng.integers(0, 9)) if spelling.cached else 0
    new = int(rng.integers(1, 12))
    batch = 1 if past and new > 1 else int(rng.integers(1, 4))
    side = str(rng.choice(["none", "left", "right"])) if spelling.padding else "none"
    return Case(batch, new, past, side, seed)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_random_attention_is_fused_and_equal(seed: int) -> None:
    spelling = random_spelling(seed)
    before = program(text(spelling))

    after = Pipeline.parse(PASSES).run(before.clone())

    assert "Softmax" not in operators(after), spelling
    node = only(after, "Attention")
    assert g.attribute(node, "kv_num_heads", 0) == spelling.groups, spelling
    assert (g.optional(node, 3) is not None) == spelling.padding, spelling
    assert (g.optional(node, 4) is not None) == spelling.cached, spelling
    lowered = Pipeline((LowerAttention(),)).run(after.clone())
    lowered.graph.opset_imports["com.microsoft"] = 1
    for case in (random_case(spelling, seed), random_case(spelling, seed + 1000)):
        given = inputs(before, case)
        want = evaluate(before, given)
        real = case.mask()[:, case.past :] == 1
        for got in (run(after, given), run(lowered, given)):
            assert error_rel(got["y"], want["y"], real) < TOLERANCE, (spelling, case.label)
