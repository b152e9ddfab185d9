"""Batches that verification puts images into."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llmopt.interface.facts import ModelFacts
from llmopt.interface.signature import Port, Role, Signature
from llmopt.ir.images import illustrated
from llmopt.ir.program import Facts, Program

IMAGE, LENGTH = 7, 3


def program(image_token: int | None = IMAGE) -> Program:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 25})
    pixels = Port("pixel_values", Role.PIXELS, "float32", ("I", 1, 2, 5))
    model = ModelFacts(vocabulary=9, image_token=image_token, image_length=LENGTH)
    return Program(ir.Model(graph, ir_version=11), Signature((pixels,)), Facts(model=model))


def test_each_row_with_room_has_an_image_and_text_beside_it() -> None:
    ids = np.full((3, 6), IMAGE)  # of which none may stand for an image by chance
    mask = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])

    found = illustrated(program(), {"input_ids": ids}, mask)

    assert (found["input_ids"] == IMAGE).astype(int).tolist() == [
        [0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert found["pixel_values"].shape == (2, 1, 2, 5)
    assert (ids == IMAGE).all()


def test_an_image_stands_among_the_first_tokens_that_are_asked_for() -> None:
    ids, mask = np.zeros((1, 9), np.int64), np.ones((1, 9), np.int64)
    assert "pixel_values" in illustrated(program(), {"input_ids": ids}, mask, within=4)
    assert "pixel_values" not in illustrated(program(), {"input_ids": ids}, mask, within=3)


def test_a_program_that_sees_nothing_gets_its_batch_back() -> None:
    batch = {"input_ids": np.zeros((1, 9), np.int64)}
    assert illustrated(program(None), batch, np.ones((1, 9), np.int64)) is batch
