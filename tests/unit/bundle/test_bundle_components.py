"""A manifest lists further models, and says what goes from one to the other."""

from __future__ import annotations

from pathlib import Path

from llmopt.artifact.manifest import Component, Manifest
from llmopt.interface.facts import ModelFacts
from llmopt.interface.signature import Port, Role, Signature, forwarded

ENCODER = Signature(
    (
        Port("input_ids", Role.TOKENS, "int64", ("B", "S")),
        Port("attention_mask", Role.MASK, "int64", ("B", "S")),
    ),
    (
        Port("last_hidden_state", Role.HIDDEN, "float32", ("B", "S", 8)),
        Port("present.0.encoder.key", Role.SOURCE_KEY, "float32", ("B", 2, "S", 4), 0),
        Port("present.1.encoder.key", Role.SOURCE_KEY, "float32", ("B", 2, "S", 4), 1),
    ),
)
DECODER = Signature(
    (
        Port("input_ids", Role.TOKENS, "int64", ("B", "S")),
        Port("attention_mask", Role.MASK, "int64", ("B", "T")),
        Port("encoder_attention_mask", Role.SOURCE_MASK, "int64", ("B", "C")),
        Port("past_key_values.1.encoder.key", Role.SOURCE_KEY, "float32", ("B", 2, "C", 4), 1),
        Port("past_key_values.0.encoder.key", Role.SOURCE_KEY, "float32", ("B", 2, "C", 4), 0),
    ),
    (Port("logits", Role.LOGITS, "float32", ("B", "K", 9)),),
)


def test_what_is_handed_over_goes_by_meaning_and_layer() -> None:
    assert forwarded(ENCODER, DECODER) == {
        "encoder_attention_mask": "attention_mask",
        "past_key_values.1.encoder.key": "present.1.encoder.key",
        "past_key_values.0.encoder.key": "present.0.encoder.key",
    }


def test_components_are_read_as_they_were_written() -> None:
    manifest = Manifest(
        target="onnxruntime-cpu",
        entry="decoder.onnx",
        task="text-to-text",
        signature=DECODER,
        components=(Component("encoder", "encoder.onnx", ENCODER),),
        model=ModelFacts(cache="shared", max_source=64, source_vocabulary=7, start=3),
    )

    read = Manifest.from_json(manifest.to_json(), Path("manifest.json"))

    assert read == manifest
    alone = read.component("encoder")
    assert alone is not None
    assert (alone.entry, alone.signature, alone.model.cache) == ("encoder.onnx", ENCODER, "none")
    assert read.component("vision") is None
