"""Definitions trace with every size dynamic, on the meta device, from some of their layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from llmopt.models.definition import FAMILIES, build

DYNAMIC = torch.export.Dim.DYNAMIC
_DECODER: Mapping[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4,
    "pad_token_id": 1,
}
_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 5, "long_factor": [2.0] * 5}


def positions(batch: int, past: int, new: int) -> torch.Tensor:
    return torch.arange(past, past + new)[None].repeat(batch, 1)


def decoder_inputs(module: Any, batch: int, past: int, new: int) -> dict[str, Any]:
    kinds = [layer.kind for layer in module.layers.values()]
    sizes = [(batch, kind.kv_heads, past, kind.head_width) for kind in kinds]
    return {
        "input_ids": torch.randint(0, 31, (batch, new)),
        "attention_mask": torch.ones(batch, past + new, dtype=torch.long),
        "position_ids": positions(batch, past, new),
        # two tensors, not one twice: torch.export would take the second for the first
        "past_key_values": [(torch.randn(size), torch.randn(size)) for size in sizes],
    }


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"model_type": "llama"}, id="llama"),
        pytest.param({"model_type": "gemma2"}, id="softcap and windows"),
        pytest.param(
            {
                "model_type": "phi3",
                "rope_scaling": _LONGROPE,
                "original_max_position_embeddings": 8,
            },
            id="longrope",
        ),
    ],
)
def test_a_decoder_of_some_layers_exports_once_for_every_size(changes: Mapping[str, Any]) -> None:
    torch.manual_seed(0)
    module: Any = build(
        FAMILIES[changes["model_type"]].parse({**_DECODER, **changes}), [0, 2], "cpu"
    )
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sizes = {0: DYNAMIC, 1: DYNAMIC}
    shapes: dict[str, Any] = dict.fromkeys(("input_ids", "attention_mask", "position_ids"), sizes)
    shapes["past_key_values"] = [({0: DYNAMIC, 2: DYNAMIC},) * 2] * 2
    exported = torch.export.export(
        module,
        (),
        decoder_inputs(module, 2, 3, 5),
        dynamic_shapes=shapes,
        prefer_deferred_runtime_asserts_over_guards=True,
    ).module()
    for batch, past, new in ((1, 0, 7), (3, 9, 1), (4, 2, 6)):
        inputs = decoder_inputs(module, batch, past, new)
        with torch.no_grad():
            torch.testing.assert_close(exported(**inputs), module(**inputs))


@pytest.mark.parametrize("model_type", ["bert", "roberta", "mpnet"])
def test_an_encoder_exports_once_for_every_size(model_type: str) -> None:
    torch.manual_seed(0)
    config = {**_DECODER, "model_type": model_type, "pooling": "mean", "normalize": True}
    module: Any = build(FAMILIES[model_type].parse(config), [1], "cpu")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    extra = ("token_type_ids",) if module.config.token_types > 1 else ()
    names = ("input_ids", "attention_mask", *extra)

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        return {name: torch.ones(batch, length, dtype=torch.long) for name in names}

    shapes = {name: {0: DYNAMIC, 1: DYNAMIC} for name in names}
    exported = torch.export.export(module, (), inputs(2, 5), dynamic_shapes=shapes).module()
    for batch, length in ((1, 9), (3, 1)):
        given = inputs(batch, length)
        with torch.no_grad():
            torch.testing.assert_close(exported(**given), module(**given))
