"""Batches with images in them, for a Program that sees some."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.interface.arrays import Arrays
from llmopt.interface.signature import Port, Role
from llmopt.ir.components import PIXELS
from llmopt.ir.program import Program

Mask = npt.NDArray[np.int64]


def illustrated(
    program: Program, batch: Arrays, mask: Mask, within: int | None = None, seed: int = 0
) -> Arrays:
    """Return a batch with one image in each row that has room for it, text before and after.

    No other token is the one that stands for an image. A Program that sees none, or is one
    component of such a one, gets its batch back.

    Args:
        program: Program that gives inputs their meaning.
        batch: ``input_ids`` [B, S] among them; they are left as they are.
        mask: [B, S], 1 where a token is.
        within: Number of first tokens that may be an image; all by default.
        seed: Seed of the pixels.
    """
    facts = program.facts.model
    ports = [p for s in program.signatures.values() for p in s.inputs if p.role == Role.PIXELS]
    if facts.image_token is None or not ports or "input_ids" not in batch:
        return batch
    ids = plain(batch["input_ids"], facts.image_token, facts.vocabulary)
    images = 0
    for row, real in zip(ids, mask, strict=True):
        places = np.flatnonzero(real[:within])
        text = len(places) - facts.image_length
        if text > 0:
            before = min(2, text - 1)
            row[places[before : before + facts.image_length]] = facts.image_token
            images += 1
    found = {**batch, "input_ids": ids}
    return found | ({PIXELS: _pixels(ports[0], images, seed)} if images else {})


def plain(tokens: npt.NDArray[Any], image_token: int, vocabulary: int) -> npt.NDArray[Any]:
    """Return tokens with others in the place of those that stand for images.

    >>> plain(np.array([3, 4, 5]), 4, 10).tolist()
    [3, 5, 5]
    """
    return np.where(tokens == image_token, (tokens + 1) % vocabulary, tokens)


def _pixels(port: Port, count: int, seed: int) -> npt.NDArray[np.float32]:
    shape = [n for n in port.shape[1:] if isinstance(n, int)]
    found: npt.NDArray[np.float32] = np.random.default_rng(seed).standard_normal(
        (count, *shape), np.float32
    )
    return found
