"""Folders of families without a definition: transformers' module, or a reason to refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from llmopt.cli.app import app
from llmopt.errors import (
    LlmoptError,
    RemoteCodeRefusedError,
    SourceError,
    UnsupportedModelError,
    UsageError,
)
from llmopt.frontend.base import SourceOptions
from llmopt.frontend.census import census
from llmopt.frontend.huggingface import loading
from llmopt.frontend.source import open_source
from llmopt.interface.signature import Role
from llmopt.ir.evaluator import Evaluator
from llmopt.ir.feeds import Case, feeds
from llmopt.passes.pipeline import Pipeline
from llmopt.verification import verify

CODE: Final = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

class OwnConfig(PretrainedConfig):
    model_type = "llmopt-own"

    def __init__(self, vocab_size=19, hidden_size=8, **more):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        super().__init__(**more)

class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        states = self.embedding(input_ids)
        if attention_mask is not None:
            states = states * attention_mask[..., None]
        return CausalLMOutput(logits=self.head(states.cumsum(1)))
"""
OWN: Final[dict[str, Any]] = {
    "model_type": "llmopt-own",
    "architectures": ["OwnForCausalLM"],
    "auto_map": {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    },
    "vocab_size": 19,
    "hidden_size": 8,
}
SIZES: Final[dict[str, Any]] = {"n_embd": 24, "n_layer": 1, "n_head": 3, "n_positions": 32}


def folder_of(config: dict[str, Any], folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder whose model is code that lies in it."""
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "modeling_own.py").write_text(CODE)
    weights = {
        "embedding.weight": torch.randn(19, 8),
        "head.weight": torch.randn(19, 8),
        "head.bias": torch.randn(19),
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder_of(OWN, folder)


def test_code_in_the_folder_is_refused_and_the_option_named(own: Path) -> None:
    with pytest.raises(RemoteCodeRefusedError, match=r"modeling_own\.py.*--trust-remote-code"):
        open_source(own, SourceOptions())

    asked = CliRunner().invoke(app, ["compile", str(own), "--target", "reference"])
    assert asked.exit_code == 2
    assert not (own / "__pycache__").exists()


def test_code_that_is_trusted_is_traced_without_a_cache_and_says_so(own: Path) -> None:
    source = open_source(own, SourceOptions(trust_remote_code=True))

    assert source.program.facts.task == "generate"
    assert not source.program.signature.has_cache
    assert any("traced without a KV cache" in note for note in source.notes)
    given = feeds(source.program.signature, Case(3, 5, 0, "left"), 19)
    (found,) = source.reference.run([given])
    assert found["logits"].shape == (3, 5, 19)


def test_without_transformers_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda _: None)

    with pytest.raises(
        UnsupportedModelError, match=r"'gptj'.*pip install 'llmopt\[transformers\]'"
    ):
        open_source(folder_of({"model_type": "gptj"}, tmp_path), SourceOptions())


@pytest.mark.parametrize(
    ("config", "error", "reason"),
    [
        ({"model_type": "nobodys"}, UnsupportedModelError, "neither llmopt nor transformers"),
        (
            {"model_type": "gptj", "architectures": ["NobodysModel"]},
            UnsupportedModelError,
            "neither llmopt nor transformers",
        ),
        (
            {"model_type": "gptj", "architectures": ["GPTJForCausalLM"]},
            SourceError,
            "transformers cannot load it",
        ),
    ],
    ids=["a type that nobody knows", "a class that nobody knows", "no weights"],
)
def test_what_cannot_be_loaded_is_refused(
    config: dict[str, Any], error: type[LlmoptError], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason):
        open_source(folder_of(config, tmp_path), SourceOptions())


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    config = transformers.GPTJConfig(vocab_size=19, rotary_dim=4, **SIZES)
    transformers.GPTJForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.0.mlp.fc_in.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(SourceError, match=r"lacks 1 tensors.*h\.0\.mlp\.fc_in\.weight"):
        open_source(tmp_path, SourceOptions())


def test_an_encoder_and_a_decoder_are_not_one_component(tmp_path: Path) -> None:
    config = transformers.LongT5Config(
        vocab_size=19, d_model=24, d_kv=8, d_ff=20, num_layers=1, num_heads=3
    )
    transformers.LongT5ForConditionalGeneration(config).save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModelError, match="an encoder-decoder"):
        open_source(tmp_path, SourceOptions())


def test_a_decoder_keeps_keys_and_values_its_limits_and_its_numbers(tmp_path: Path) -> None:
    config = transformers.GPTJConfig(
        vocab_size=19, rotary_dim=4, bos_token_id=1, eos_token_id=2, **SIZES
    )
    transformers.GPTJForCausalLM(config).save_pretrained(tmp_path)

    source = open_source(tmp_path, SourceOptions(max_length=16))

    program = source.program
    names = [port.name for port in program.signature.inputs]
    assert names == [
        *("input_ids", "attention_mask", "position_ids"),
        *("past_key_values.0.key", "past_key_values.0.value", "logits_to_keep"),
    ]
    assert [port.role for port in program.signature.outputs] == [
        *(Role.LOGITS, Role.PRESENT_KEY, Role.PRESENT_VALUE),
    ]
    model = program.facts.model
    assert (model.layers, model.heads, model.head_width, model.max_length) == (1, 3, 8, 16)
    assert (model.bos, model.eos, model.cache) == (1, (2,), "concat")
    assert program.facts.expected == {"attention": 1, "norm": 2}
    Pipeline.parse("default").run(program)
    assert {"Attention", "RotaryEmbedding"} <= {node.op_type for node in program.graph}
    run = Evaluator(program.model).run
    assert verify(program, run, source.reference, tolerance=1e-5).cases[-1].label == "B3 S7 P4 left"
    with pytest.raises(UsageError, match="is for 'generate'"):
        open_source(tmp_path, SourceOptions(task="embed"))


def test_a_module_that_layers_share_is_counted_as_often_as_it_is_called() -> None:
    class SelfAttention(torch.nn.Identity):
        pass

    class WholeAttention(torch.nn.Sequential):
        pass

    shared = WholeAttention(SelfAttention())
    module = torch.nn.Sequential(shared, torch.nn.LayerNorm(2), shared)

    assert census(module, lambda: module(torch.ones(1, 2))) == {"attention": 2, "norm": 1}
