"""Real models, compiled here for arm64, pass their self-test on arm64 programs under an emulator.

What an arm64 kernel computes is compared with what the kernels here computed when the artifact was
compiled: the tokenizer, the logits of a prefill and of every step after it, and the best token
wherever it leads by more than twice the tolerance. What is tested is a bundle, as a device gets it;
of the smaller model the folder too.

The example that every artifact carries has few tokens that lead so clearly at ``w4``, whose
tolerance has to suit kernels that scale many activations together. TVM's do not, and nothing is as
sure as the next word of what was said before: a text that repeats itself, compared with half the
tolerance, has many.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from edge.arm64 import MissingError, machine
from support import real_models

import llmopt
from llmopt.backends.base import COUNTED, ExampleBounds
from llmopt.bundle.creating import create

pytestmark = pytest.mark.slow

LOGITS = ["files", "tokenizer", "logits", "best token"]
VECTORS = ["files", "tokenizer", "last_hidden_state", "sentence_embedding"]
NAMES = {"SmolLM2.llmopt": LOGITS, "MiniLM.llmopt": VECTORS, "MiniLM": VECTORS}
TOLERANCE = 0.05
CLEAR = 8
"""Tokens that lead by more than twice that, at least."""
REPEATED = "The sky is blueThe sky is blue, isn't it? Na\u00efve \u6570 \U0001f642 42."


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each says of itself there: one start of the emulated Python tests all."""
    try:
        emulated = machine()
    except MissingError as error:
        pytest.skip(f"needs an arm64 machine: {error}")
    work = tmp_path_factory.mktemp("bundles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMOPT_CACHE", str(work / "cache"))
        # What it costs in quality is measured elsewhere, on the same weights.
        patch.setattr("llmopt.compiler.compilation.measure_quality", lambda *_: {})
        source, scheme = real_models.minilm_folder(), "w8a8-dynamic"
        llmopt.compile(source, target="onnxruntime-arm64", quantize=scheme, output=work / "MiniLM")
        patch.setattr("llmopt.compiler.golden.TEXT", REPEATED)
        patch.setattr("llmopt.compiler.golden.TOKENS", 24)
        patch.setattr(
            "llmopt.backends.tvm.TvmArm64.example_bounds",
            lambda *_: ExampleBounds(TOLERANCE, COUNTED),
        )
        source = real_models.smollm2_gguf()
        llmopt.compile(source, target="tvm-arm64", quantize="w4", output=work / "SmolLM2")
        for name in ("SmolLM2", "MiniLM"):
            create([work / name], work / f"{name}.llmopt", version=llmopt.__version__)
        places = [work / name for name in NAMES]
        said = emulated.run(Path(__file__).with_name("guest.py"), "--selftest", *places)
    return dict(zip(NAMES, objects(said), strict=True))


def objects(text: str) -> Iterator[Any]:
    """Yield JSON objects that stand one after the other."""
    while text := text.lstrip():
        value, end = json.JSONDecoder().raw_decode(text)
        yield value
        text = text[end:]


@pytest.mark.parametrize("name", NAMES)
def test_a_real_model_passes_its_selftest_on_arm64(found: dict[str, Any], name: str) -> None:
    result = found[name]

    assert result["passed"], result
    assert result["machine"]["architecture"] == "aarch64"
    assert [check["name"] for check in result["checks"]] == NAMES[name]
    compared = {check["name"]: check["compared"] for check in result["checks"]}
    assert all(compared.values()), compared
    errors = [check["error_rel"] for check in result["checks"] if check["error_rel"] is not None]
    assert min(errors) > 0, "the same kernels cannot have run there"


def test_many_tokens_that_lead_clearly_are_the_same_there(found: dict[str, Any]) -> None:
    checks = {check["name"]: check for check in found["SmolLM2.llmopt"]["checks"]}

    assert checks["logits"]["tolerance"] == TOLERANCE
    assert checks["best token"]["passed"]
    assert checks["best token"]["compared"] >= CLEAR
