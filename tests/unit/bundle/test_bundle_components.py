"""A manifest lists further models, and says what goes from one to the other."""

from __future__ import annotations

from pathlib import Path

from llmopt.bundle.manifest import Component, Manifest, ModelFacts, Port, Signature, handed_over

ENCODER = Signature(
    (
        Port("input_ids", "tokens", "int64", ("B", "S")),
        Port("attention_mask", "mask", "int64", ("B", "S")),
    ),
    (
        Port("last_hidden_state", "hidden", "float32", ("B", "S", 8)),
        Port("present.0.encoder.key", "source_key", "float32", ("B", 2, "S", 4), 0),
        Port("present.1.encoder.key", "source_key", "float32", ("B", 2, "S", 4), 1),
    ),
)
DECODER = Signature(
    (
        Port("input_ids", "tokens", "int64", ("B", "S")),
        Port("attention_mask", "mask", "int64", ("B", "T")),
        Port("encoder_attention_mask", "source_mask", "int64", ("B", "C")),
        Port("past_key_values.1.encoder.key", "source_key", "float32", ("B", 2, "C", 4), 1),
        Port("past_key_values.0.encoder.key", "source_key", "float32", ("B", 2, "C", 4), 0),
    ),
    (Port("logits", "logits", "float32", ("B", "K", 9)),),
)


def test_what_is_handed_over_goes_by_meaning_and_layer() -> None:
    assert handed_over(ENCODER, DECODER) == {
        "encoder_attention_mask": "attention_mask",
        "past_key_values.1.encoder.key": "present.1.encoder.key",
        "past_key_values.0.encoder.key": "present.0.encoder.key",
    }


def test_components_are_read_as_they_were_written() -> None:
    manifest = Manifest(
        "onnxruntime-cpu",
        "decoder.onnx",
        "text-to-text",
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
