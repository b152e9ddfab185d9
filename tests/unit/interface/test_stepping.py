"""One driver steps every decoder: a function with arrays fed back, and a session's own cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from support.programs import evaluate
from support.tiny_artifacts import TinyDecoder
from support.tiny_decoder import VOCABULARY, tiny_decoder

from llmopt.errors import UsageError
from llmopt.interface.arrays import Array, Arrays
from llmopt.interface.facts import CacheKind
from llmopt.interface.signature import Port, Role, Signature
from llmopt.interface.stepping import RunDecoder, Sequences, Step, forced, one_by_one
from llmopt.runtime import load

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 9))
IDS = Port("input_ids", Role.TOKENS, "int32", ("B", "S"))
POSITIONS = Port("position_ids", Role.POSITIONS, "int64", ("B", "S"))
KEEP = Port("logits_to_keep", Role.LOGITS_TO_KEEP, "int64", ())
LOGITS = Port("logits", Role.LOGITS, "float32", ("B", "K", "V"))
COUNTING = Signature((IDS, POSITIONS), (LOGITS,))


def decoder(*, keep: bool = False) -> RunDecoder:
    program = tiny_decoder(keep=keep)
    return RunDecoder(program.signature, lambda feeds: evaluate(program, feeds))


def left_padded() -> npt.NDArray[np.int64]:
    mask = np.ones_like(TOKENS)
    mask[1, :2] = mask[2, :4] = 0
    return mask


def positions(feeds: Mapping[str, Array]) -> Arrays:
    """Run a model whose logits are its positions."""
    return {"logits": feeds["position_ids"][..., None].astype(np.float32)}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("steps", [one_by_one(5, 9), [4, 3, 2]], ids=["decode", "chunks"])
def test_steps_give_the_logits_of_one_pass(steps: list[int], *, keep: bool) -> None:
    model, mask = decoder(keep=keep), left_padded()

    stepped = forced(Sequences(model, 3, 9), TOKENS, mask, steps)

    wanted = forced(Sequences(model, 3, 9), TOKENS, mask, [9])
    assert stepped.shape == (3, 9, VOCABULARY)
    np.testing.assert_allclose(stepped[mask == 1], wanted[mask == 1], rtol=1e-4, atol=1e-5)


def test_a_step_gives_the_last_logits_unless_all_are_wanted() -> None:
    for keep in (False, True):
        last = Sequences(decoder(keep=keep), 3, 9).extend(TOKENS)
        every = Sequences(decoder(keep=keep), 3, 9).extend(TOKENS, every=True)

        assert every.shape[1] == 9
        np.testing.assert_allclose(last, every[:, -1:], rtol=1e-5)


def test_rows_go_on_from_what_other_rows_remember() -> None:
    model = decoder()
    sequences = Sequences(model, 3, 9)
    sequences.extend(TOKENS[:, :8])

    sequences.reorder([2, 0, 2])
    logits = sequences.extend(TOKENS[:, 8:])

    reordered = np.concatenate([TOKENS[[2, 0, 2], :8], TOKENS[:, 8:]], axis=1)
    np.testing.assert_allclose(logits, Sequences(model, 3, 9).extend(reordered), rtol=1e-4)


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [([0, 0, 1, 1], [0, 0, 0, 1, 2, 3]), ([1, 1, 0, 0], [0, 1, 0, 0, 2, 3])],
    ids=["left", "right"],
)
def test_positions_are_counted_over_real_tokens(mask: list[int], wanted: list[int]) -> None:
    sequences = Sequences(RunDecoder(COUNTING, positions), 1, 6)

    first = sequences.extend(np.zeros((1, 4), np.int64), np.array([mask]), every=True)
    rest = [sequences.extend(np.zeros((1, 1), np.int64))[0, -1, 0] for _ in range(2)]

    assert [*first[0, :, 0], *rest] == wanted


def test_without_a_cache_the_whole_prefix_runs_again_and_rows_cannot_be_reordered() -> None:
    lengths: list[int] = []

    def run(feeds: Mapping[str, Array]) -> Arrays:
        lengths.append(feeds["input_ids"].shape[1])
        return positions(feeds)

    sequences = Sequences(RunDecoder(COUNTING, run), 2, 6)
    forced(sequences, TOKENS[:2, :6], None, [3, 2, 1])

    assert lengths == [3, 5, 6]
    sequences.reorder([0, 1])
    with pytest.raises(UsageError, match="does not support beam search"):
        sequences.reorder([1, 0])


def test_steady_inputs_are_the_same_arrays_in_every_step() -> None:
    steady = np.ones((1, 4), np.float32)
    handed: list[Array] = []

    def run(feeds: Mapping[str, Array]) -> Arrays:
        handed.append(feeds["encoder.input_ids"])
        return positions(feeds)

    sequences = Sequences(RunDecoder(COUNTING, run), 1, 3, {"encoder.input_ids": steady})
    forced(sequences, TOKENS[:1, :3], None, one_by_one(1, 3))

    assert [array is steady for array in handed] == [True] * 3


def test_logits_that_the_next_run_overwrites_are_kept() -> None:
    buffer = np.zeros((1, 1, 1), np.float32)

    def run(feeds: Mapping[str, Array]) -> Arrays:
        buffer[...] = feeds["position_ids"][:, -1]
        return {"logits": buffer}

    logits = forced(Sequences(RunDecoder(COUNTING, run), 1, 3), TOKENS[:1, :3], None, [1, 1, 1])

    assert logits[0, :, 0].tolist() == [0, 1, 2]


def test_a_step_feeds_what_the_model_takes_in_its_dtypes() -> None:
    types = Port("token_type_ids", Role.TOKEN_TYPES, "int64", ("B", "S"))
    mask = np.ones((3, 9), np.int64)
    step = Step(TOKENS, mask, TOKENS, every=True)

    feeds = step.feeds(Signature((IDS, types, KEEP), (LOGITS,)))

    assert list(feeds) == ["input_ids", "token_type_ids", "logits_to_keep"]
    assert feeds["input_ids"].dtype == np.int32
    assert not feeds["token_type_ids"].any()
    assert feeds["logits_to_keep"].shape == ()
    assert feeds["logits_to_keep"] == 0


def test_embeddings_enter_in_the_place_of_tokens() -> None:
    port = Port("inputs_embeds", Role.EMBEDS, "float32", ("B", "S", 2))
    embeds = np.ones((3, 9, 2), np.float32)
    step = Step(TOKENS, np.ones_like(TOKENS), TOKENS, every=False, embeds=embeds)

    feeds = step.feeds(Signature((port, KEEP), (LOGITS,)))

    assert list(feeds) == ["inputs_embeds", "logits_to_keep"]
    assert feeds["inputs_embeds"].shape == (3, 9, 2)
    assert feeds["logits_to_keep"] == 1


@pytest.mark.parametrize("cache", ["concat", "none"])
def test_a_session_and_its_plain_run_step_alike(cache: CacheKind, tmp_path: Path) -> None:
    session = load(TinyDecoder(cache).write(tmp_path / "artifact"), threads=1).session
    plain = RunDecoder(session.signature, session.run)
    mask = left_padded()

    own = forced(Sequences(session, 3, 9), TOKENS, mask, one_by_one(5, 9))
    fed = forced(Sequences(plain, 3, 9), TOKENS, mask, one_by_one(5, 9))

    np.testing.assert_array_equal(own, fed)
