"""Landmarks go with a graph's values, whatever these are named."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
from support.programs import only, program
from support.tiny_decoder import TEXT, tiny_decoder

from llmopt.backends.caches import shared_cache_obstacle
from llmopt.errors import SourceError
from llmopt.frontend.base import SourceOptions
from llmopt.frontend.onnx.saved import KEY, save_program
from llmopt.frontend.source import open_source
from llmopt.ir.landmarks import Landmark, is_landmark, mark, names

FOREIGN = TEXT.replace("[padding_mask]", "[other]")


def test_a_landmark_stays_with_a_copy_and_with_its_parts() -> None:
    made = tiny_decoder(keep=True)

    for each in (made.clone(), *made.parts()):
        mask = each.landmark(Landmark.PADDING_MASK)
        assert mask is not None
        assert mask.graph is each.graph
        assert is_landmark(each.landmark(Landmark.LAST_TOKENS), Landmark.LAST_TOKENS)
    assert made.landmark(Landmark.POSITIONS) is None


def test_what_is_removed_is_no_landmark() -> None:
    made = program("main (float[B] x) => (float[B] y) { a = Relu (x)\n y = Abs (x) }")
    node = only(made, "Relu")
    mark(node.outputs[0], Landmark.SLOTS)
    made.graph.remove(node, safe=True)

    assert made.landmark(Landmark.SLOTS) is None


@pytest.mark.parametrize("landmark", [Landmark.PADDING_MASK, Landmark.LAST_TOKENS])
def test_a_name_makes_no_landmark(landmark: Landmark) -> None:
    made = tiny_decoder(text=FOREIGN)
    node = only(made, "Unsqueeze")
    node.name = landmark.value
    node.outputs[0].name = landmark.value

    assert made.landmark(landmark) is None
    assert "mask of its own" in str(shared_cache_obstacle(made))


def test_a_landmark_is_in_no_model_that_is_written() -> None:
    marked, bare = (ir.to_proto(tiny_decoder(text=text).model) for text in (TEXT, FOREIGN))
    for node in bare.graph.node:
        node.name = node.name.replace("other", "padding_mask")

    assert marked.SerializeToString() == bare.SerializeToString()


def test_a_saved_program_keeps_its_landmarks(tmp_path: Path) -> None:
    made = tiny_decoder(keep=True)
    save_program(made, tmp_path / "model.onnx")

    read = open_source(tmp_path / "model.onnx", SourceOptions()).program

    assert {*names(made.graph)} == {"padding_mask", "logits_to_keep/Slice"}
    assert names(read.graph) == names(made.graph)


def test_a_landmark_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_program(tiny_decoder(), path)
    model = ir.load(path)
    saved = json.loads(model.metadata_props[KEY]) | {"landmarks": {"sea mark": "real"}}
    model.metadata_props[KEY] = json.dumps(saved)
    ir.save(model, path)

    with pytest.raises(SourceError, match="sea mark"):
        open_source(path, SourceOptions())
