"""Decoders step by step: every kind of cache computes what one full pass does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.tiny_artifacts import EOS, GROUPS, MAX_LENGTH, VOCABULARY, WIDTH, TinyDecoder

from llmopt.errors import LlmoptError, UsageError
from llmopt.interface.arrays import Array
from llmopt.interface.stepping import Sequences
from llmopt.runtime import Runner, load
from llmopt.runtime.engines.onnxruntime import OnnxRuntimeSession, SharedCache
from llmopt.runtime.generation import capacity_for, padding_token
from llmopt.runtime.session import aligned_zeros

PROMPTS = [[1, 2, 3], [9, 8, 7, 6, 5, 4], [100]]
REFERENCE = TinyDecoder()


def tokens(batch: int, length: int) -> Array:
    return np.random.default_rng(0).integers(0, EOS, (batch, length))


def relative(got: Array, expected: Array) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("prefill", [None, 1, 5, 10, 11])
def test_logits_are_those_of_one_full_pass(decoder: Runner, prefill: int | None) -> None:
    ids = tokens(2, 11)
    got = decoder.logits(ids, prefill)
    assert got.dtype == np.float32
    assert got.shape == (2, 11, VOCABULARY)
    assert relative(got, REFERENCE.logits(ids)) < 1e-5


@pytest.mark.parametrize("prefill", [None, 5])
def test_padding_in_front_changes_nothing(decoder: Runner, prefill: int | None) -> None:
    ids = tokens(3, 11)
    mask = np.ones_like(ids)
    mask[0, :4] = mask[2, :2] = 0
    got = decoder.logits(ids, prefill, mask=mask)
    for row, start in enumerate((4, 0, 2)):
        alone = REFERENCE.logits(ids[row : row + 1, start:])[0]
        assert relative(got[row, start:], alone) < 1e-5


def test_greedy_tokens_of_a_batch_are_those_of_each_prompt(decoder: Runner) -> None:
    expected = [REFERENCE.greedy(prompt, 12) for prompt in PROMPTS]
    assert decoder.generate_ids(PROMPTS, max_new_tokens=12) == expected
    assert decoder.generate_ids(PROMPTS[0], max_new_tokens=12) == expected[0]
    assert decoder.generate_ids(np.array([PROMPTS[0]]), max_new_tokens=12) == expected[:1]


def test_a_row_ends_at_its_stop_token_and_the_others_go_on(decoder: Runner) -> None:
    free = decoder.generate_ids(PROMPTS, max_new_tokens=8)
    stop = free[0][2]
    got = decoder.generate_ids(PROMPTS, max_new_tokens=8, stop_tokens=[stop])
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert got == expected
    assert len({len(row) for row in got}) > 1


def test_the_manifest_s_end_token_ends_a_row(folders: Path, tmp_path: Path) -> None:
    free = load(folders / "shared", threads=1).generate_ids([1, 2, 3], max_new_tokens=8)
    runner = load(TinyDecoder().write(tmp_path / "a", eos=(free[3],)), threads=1)
    assert runner.generate_ids([1, 2, 3], max_new_tokens=8) == free[: free.index(free[3]) + 1]
    assert runner.generate_ids([1, 2, 3], max_new_tokens=8, stop_tokens=()) == free


def test_generation_stops_at_the_model_s_length(decoder: Runner) -> None:
    prompt = list(range(1, MAX_LENGTH - 2))
    assert len(decoder.generate_ids(prompt, max_new_tokens=50, stop_tokens=())) == 3


def test_the_same_seed_gives_the_same_tokens_for_every_cache(folders: Path) -> None:
    rows = [
        load(folders / kind, threads=1).generate_ids(
            PROMPTS, max_new_tokens=6, temperature=0.9, top_p=0.8, top_k=30, seed=3
        )
        for kind in ("shared", "concat", "none")
    ]
    assert rows[0] == rows[1] == rows[2]
    assert rows[0] != [REFERENCE.greedy(prompt, 6) for prompt in PROMPTS]


def test_the_shared_cache_is_written_in_place(folders: Path) -> None:
    session = load(folders / "shared", threads=1).session
    assert isinstance(session, OnnxRuntimeSession)
    stepper = SharedCache(session, 1, 16)
    kept = stepper._binding._kept
    buffers = {name: value.numpy() for name, value in kept.items() if "past" in name}
    assert {array.shape for array in buffers.values()} == {(1, GROUPS, 16, WIDTH)}
    sequences = Sequences(session, 1, 16)
    sequences._stepper = stepper
    sequences.extend(tokens(1, 5))
    sequences.extend(tokens(1, 1))
    for name, array in buffers.items():
        assert kept[name].data_ptr() == array.ctypes.data
        filled = np.abs(array).sum(axis=(0, 1, 3)) > 0
        assert filled.tolist() == [True] * 6 + [False] * 10


def test_a_step_leaves_the_caller_s_tokens_alone(decoder: Runner) -> None:
    sequences = Sequences(decoder.session, 1, 8)
    first = np.array([[5]], np.int64)
    sequences.extend(first)
    sequences.extend(np.array([[6]], np.int64))
    assert first.tolist() == [[5]]


def test_several_tokens_may_follow_single_ones(folders: Path) -> None:
    ids = tokens(1, 9)
    for kind in ("shared", "concat", "none"):
        sequences = Sequences(load(folders / kind, threads=1).session, 1, 9)
        parts = [ids[:, :3], ids[:, 3:4], ids[:, 4:5], ids[:, 5:8], ids[:, 8:]]
        got = [sequences.extend(part, every=True).copy() for part in parts]
        assert relative(np.concatenate(got, axis=1), REFERENCE.logits(ids)) < 1e-5


def test_only_the_last_logits_come_unless_all_are_asked_for(decoder: Runner) -> None:
    ids = tokens(2, 4)
    last = Sequences(decoder.session, 2, 8).extend(ids)
    assert last.shape == (2, 1, VOCABULARY)
    assert relative(last, REFERENCE.logits(ids)[:, -1:]) < 1e-5


def test_there_is_no_room_past_the_capacity(decoder: Runner) -> None:
    sequences = Sequences(decoder.session, 1, 4)
    sequences.extend(tokens(1, 3))
    with pytest.raises(UsageError, match="5 tokens exceed the capacity of 4"):
        sequences.extend(tokens(1, 2))


def test_without_a_mask_prompts_go_one_by_one(tmp_path: Path) -> None:
    model = TinyDecoder("concat", maskless=True, keep=False)
    runner = load(model.write(tmp_path / "a"), threads=1)
    expected = [model.greedy(prompt, 5) for prompt in PROMPTS]
    assert runner.generate_ids(PROMPTS, max_new_tokens=5) == expected
    assert relative(runner.logits(tokens(2, 7), 3), model.logits(tokens(2, 7))) < 1e-5


@pytest.mark.parametrize("cache", ["shared", "none"])
def test_a_model_without_a_choice_of_logits_gives_them_all(tmp_path: Path, cache: str) -> None:
    model = TinyDecoder(cache, keep=False)  # type: ignore[arg-type] # one of the literals
    runner = load(model.write(tmp_path / "a"), threads=1)
    assert relative(runner.logits(tokens(2, 7), 3), model.logits(tokens(2, 7))) < 1e-5
    expected = [model.greedy(prompt, 5) for prompt in PROMPTS]
    assert runner.generate_ids(PROMPTS, max_new_tokens=5) == expected


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ([], "prompt is empty"),
        ([[1], []], "prompt is empty"),
        ([1] * MAX_LENGTH, f"prompt has {MAX_LENGTH} tokens and the model takes {MAX_LENGTH}"),
        ([1, VOCABULARY], f"token {VOCABULARY} is not one of the model's {VOCABULARY}"),
        ([-2], "token -2 is not"),
    ],
)
def test_prompts_the_model_cannot_take_are_refused(
    decoder: Runner, prompt: list[int], problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        decoder.generate_ids(prompt)


@pytest.mark.parametrize(
    ("ids", "prefill", "problem"),
    [
        ([1, 2], None, r"\[B, S\] and not empty, not \[2\]"),
        ([[]], None, "not empty"),
        ([[1, 2]], 3, "prefill 3 is not between 1 and 2"),
        ([[1, 2]], 0, "prefill 0"),
        ([[1] * (MAX_LENGTH + 1)], None, f"more than the model's {MAX_LENGTH}"),
        ([[VOCABULARY]], None, "is not one of"),
    ],
)
def test_logits_say_what_is_wrong_with_the_tokens(
    decoder: Runner, ids: list[list[int]], prefill: int | None, problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        decoder.logits(ids, prefill)


@pytest.mark.parametrize("cache", ["shared", "concat"])
def test_a_model_with_its_last_logits_only_generates(tmp_path: Path, cache: str) -> None:
    folder = TinyDecoder(cache).write(tmp_path / "a")  # type: ignore[arg-type] # one of the literals
    data = json.loads((folder / "manifest.json").read_text())
    data["signature"]["inputs"].pop()  # logits_to_keep, which then stays at 1
    data["signature"]["outputs"][0]["shape"] = ["B", 1, VOCABULARY]
    (folder / "manifest.json").write_text(json.dumps(data))
    runner = load(folder, threads=1)
    assert runner.generate_ids([1, 2, 3], max_new_tokens=5) == REFERENCE.greedy([1, 2, 3], 5)
    assert relative(runner.logits([[1, 2, 3]], 1), REFERENCE.logits(np.array([[1, 2, 3]]))) < 1e-5
    with pytest.raises(UsageError, match="logits of the last token only"):
        runner.logits([[1, 2, 3]])


def test_an_encoder_gives_no_logits(folders: Path) -> None:
    with pytest.raises(LlmoptError, match=r"task 'embed'.*no 'logits'"):
        load(folders / "encoder", threads=1).logits([[1, 2]])


def test_open_cache_sizes_are_refused(tmp_path: Path) -> None:
    text = TinyDecoder().write(tmp_path / "a") / "manifest.json"
    text.write_text(text.read_text().replace(f'          {GROUPS},\n          "P"', '"G", "P"'))
    with pytest.raises(UsageError, match="leaves heads or width"):
        load(tmp_path / "a").generate_ids([1])


def test_capacities_are_rounded_up_within_the_model_s_length() -> None:
    assert [capacity_for(n, 100) for n in (1, 64, 65)] == [64, 64, 100]
    assert capacity_for(65, 0) == 128


def test_padding_tokens_are_valid_ones() -> None:
    assert [padding_token(7, [1]), padding_token(None, [1]), padding_token(-1, [])] == [7, 1, 0]


def test_buffers_are_aligned_zeros() -> None:
    for size in (1, 3, 1000):
        array = aligned_zeros((size, 3), "float16")
        assert array.ctypes.data % 64 == 0
        assert array.shape == (size, 3)
        assert not array.any()
