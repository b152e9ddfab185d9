"""Real models, compiled here for arm64, pass their self-test on arm64 programs under an emulator.

What an arm64 kernel computes is compared with what the kernels here computed when the artifact was
compiled: the tokenizer, the logits of a prefill and of every step after it, and the best token
wherever it leads by more than twice the tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import real_models
from edge.arm64 import MissingError, machine

import llmopt

pytestmark = pytest.mark.slow

NAMES = {
    "SmolLM2": ["files", "tokenizer", "logits", "best token"],
    "MiniLM": ["files", "tokenizer", "last_hidden_state", "sentence_embedding"],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each artifact says of itself there: one start of the emulated Python tests both."""
    try:
        emulated = machine()
    except MissingError as error:
        pytest.skip(f"needs an arm64 machine: {error}")
    work = tmp_path_factory.mktemp("bundles")
    source = real_models.smollm2_gguf()
    llmopt.compile(source, target="tvm-arm64", quantize="w4", output=work / "SmolLM2")
    source, scheme = real_models.minilm_folder(), "w8a8-dynamic"
    llmopt.compile(source, target="onnxruntime-arm64", quantize=scheme, output=work / "MiniLM")
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
