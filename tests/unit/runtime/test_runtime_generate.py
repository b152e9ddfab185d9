"""Text in, text out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest
from support.tiny_artifacts import EOS, PAD, TinyDecoder
from tokenizers import Tokenizer, decoders, processors

from llmopt.artifact.manifest import Manifest
from llmopt.errors import ArtifactError, UsageError
from llmopt.interface.arrays import Array
from llmopt.interface.stepping import Sequences
from llmopt.runtime import Runner, load
from llmopt.runtime.chat import ChatFormat, Join
from llmopt.runtime.generation import Request

REFERENCE = TinyDecoder()


def expected_text(prompt: str, count: int) -> str:
    return decode(REFERENCE.greedy(list(prompt.encode()), count))


def decode(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < EOS).decode(errors="replace")


def test_generate_gives_the_new_text_only(decoder: Runner) -> None:
    assert decoder.generate("Hello", max_new_tokens=12) == expected_text("Hello", 12)


def test_a_list_of_prompts_gives_a_list(decoder: Runner) -> None:
    prompts = ["Hello", "a", "Once upon"]
    got = decoder.generate(prompts, max_new_tokens=9)
    assert got == [expected_text(prompt, 9) for prompt in prompts]
    assert decoder.generate(["Hello"], max_new_tokens=9) == got[:1]
    nothing: list[str] = []
    assert decoder.generate(nothing) == []


def test_streamed_pieces_join_to_the_text(decoder: Runner) -> None:
    pieces = list(decoder.stream("Hello", max_new_tokens=20))
    assert len(pieces) > 3
    assert all(pieces)
    assert "".join(pieces) == decoder.generate("Hello", max_new_tokens=20)


def test_stop_strings_end_the_text_and_are_not_in_it(decoder: Runner) -> None:
    text = expected_text("Hello", 20)
    stop = text[8:10]
    cut = text[: text.index(stop)]
    assert decoder.generate("Hello", max_new_tokens=20, stop=stop) == cut
    assert decoder.generate("Hello", max_new_tokens=20, stop=["never there", stop]) == cut
    assert "".join(decoder.stream("Hello", max_new_tokens=20, stop=stop)) == cut


def test_a_stop_string_ends_its_own_row_only(decoder: Runner) -> None:
    texts = [expected_text(prompt, 12) for prompt in ("Hello", "a")]
    stop = next(c for c in texts[0][1:] if c not in texts[1])
    got = decoder.generate(["Hello", "a"], max_new_tokens=12, stop=stop)
    assert got == [texts[0][: texts[0].index(stop)], texts[1]]


def test_nothing_is_computed_behind_a_stop_string(
    decoder: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    extend = Sequences.extend

    def counted(self: Sequences, tokens: Array, mask: Array | None = None) -> Array:
        lengths.append(tokens.shape[1])
        return extend(self, tokens, mask)

    monkeypatch.setattr(Sequences, "extend", counted)
    text = decoder.generate("Hello", max_new_tokens=20, stop=expected_text("Hello", 20)[3])
    assert len(text) <= 3
    assert len(lengths) < 8


def edit_tokenizer(folder: Path, decoder: Any, processor: Any) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.decoder, backend.post_processor = decoder, processor
    (folder / "tokenizer.json").write_text(backend.to_str())
    manifest = Manifest.read(folder)
    manifest.with_files(folder).write(folder)


def test_a_first_space_is_kept_behind_a_text_and_dropped_in_an_answer(chatty: Path) -> None:
    strips = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    edit_tokenizer(chatty, strips, processors.ByteLevel())
    runner = load(chatty, threads=1)
    pairs = (first + second for first in ascii_letters for second in ascii_letters)
    prompt = next(pair for pair in pairs if REFERENCE.greedy(list(pair.encode()), 1) == [32])
    assert runner.generate(prompt, max_new_tokens=4) == expected_text(prompt, 4)
    chat = ChatFormat((Join("start", "user", ""), Join("user", "generate", "")))
    (chatty / "chat.json").write_text(chat.to_json())
    answer = runner.generate(prompt, chat=True, max_new_tokens=4)
    assert answer == expected_text(prompt, 4).removeprefix(" ")


def test_a_chat_format_has_its_own_special_tokens(chatty: Path) -> None:
    adds = processors.TemplateProcessing("<pad> $A", None, [("<pad>", PAD)])
    edit_tokenizer(chatty, decoders.ByteLevel(), adds)
    runner = load(chatty, threads=1)
    begun = decode(REFERENCE.greedy([PAD, *b"Hi"], 6))
    assert runner.generate("Hi", max_new_tokens=6) == begun
    answer = runner.generate("Hi", chat=True, max_new_tokens=6)
    assert answer == expected_text("U:Hi A:", 6) != begun


def test_the_token_that_ends_a_row_is_not_in_the_text(tmp_path: Path) -> None:
    made = REFERENCE.greedy(list(b"Hello"), 10)
    end = next(token for token in made[3:] if token < 128)
    runner = load(TinyDecoder().write(tmp_path / "a", eos=(end,)), threads=1)
    cut = decode(made[: made.index(end)])
    assert runner.generate("Hello", max_new_tokens=10) == cut


def test_an_empty_prompt_begins_with_the_begin_token(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        load(TinyDecoder().write(tmp_path / "a"), threads=1).generate("")
    runner = load(TinyDecoder().write(tmp_path / "b", bos=65), threads=1)
    assert runner.generate("", max_new_tokens=5) == expected_text("A", 5)


def test_recomputing_is_said_once(folders: Path, messages: pytest.LogCaptureFixture) -> None:
    runner = load(folders / "none", threads=1)
    for _ in range(2):
        runner.generate("Hello", max_new_tokens=2)
    assert [r.message for r in messages.records] == [
        "no KV cache: each new token recomputes the whole prefix"
    ]
    load(folders / "shared", threads=1).generate("Hello", max_new_tokens=2)
    assert len(messages.records) == 1


def test_chat_without_a_chat_format_says_so(folders: Path) -> None:
    with pytest.raises(UsageError, match=r"no chat format \(chat.json\)"):
        load(folders / "shared", threads=1).generate("Hello", chat=True)


CHAT = ChatFormat(
    joins=(
        Join("start", "user", "U:"),
        Join("user", "generate", " A:"),
        Join("start", "system", "S:"),
        Join("system", "user", " U:"),
    )
)


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    folder = TinyDecoder().write(tmp_path / "chatty")
    (folder / "chat.json").write_text(CHAT.to_json())
    return folder


def test_chat_asks_in_the_artifact_s_format(chatty: Path) -> None:
    runner = load(chatty, threads=1)
    answer = expected_text("U:Hi A:", 6)
    assert runner.generate("Hi", chat=True, max_new_tokens=6) == answer
    assert "".join(runner.stream("Hi", chat=True, max_new_tokens=6)) == answer
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    longer = expected_text("S:Be brief. U:Hi A:", 6)
    assert runner.generate(talk, chat=True, max_new_tokens=6) == longer
    assert runner.generate([talk, talk[1:]], chat=True, max_new_tokens=6) == [longer, answer]


def test_conversations_that_do_not_fit_are_refused(chatty: Path) -> None:
    runner = load(chatty, threads=1)
    talk = [{"role": "user", "content": "Hi"}]
    with pytest.raises(UsageError, match="needs chat=True"):
        runner.generate(talk)
    with pytest.raises(UsageError, match="no role 'tool'"):
        runner.generate([{"role": "tool", "content": "x"}], chat=True)
    with pytest.raises(UsageError, match="a message has no 'content'"):
        runner.generate([{"role": "user"}], chat=True)
    (chatty / "chat.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"chat\.json: not a chat format"):
        runner.generate(talk, chat=True)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 is below 1"),
        ({"temperature": -1}, "temperature"),
        ({"tempreature": 1}, "unknown option 'tempreature'; did you mean 'temperature'"),
        ({"max_tokens": 5}, "unknown option 'max_tokens'; did you mean 'max_new_tokens'"),
    ],
)
def test_bad_options_are_refused(folders: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        load(folders / "shared", threads=1).generate("Hello", **options)


def test_a_request_has_one_stop_or_several() -> None:
    assert Request(stop="a b").stops == ("a b",)
    assert Request(stop=["a", "b"]).stops == ("a", "b")


def test_generating_loads_only_what_a_device_has(folders: Path) -> None:
    script = f"""
import sys
from llmopt.runtime import load
early = {{"onnxruntime", "tokenizers"}} & set(sys.modules)
load({str(folders / "shared")!r}, threads=1).generate("Hello", max_new_tokens=2)
heavy = {{"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "ml_dtypes"}}
print(sorted(early), sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] []"


def test_a_runner_is_shown_by_what_it_runs(folders: Path) -> None:
    runner = load(folders / "shared", threads=1)

    assert repr(runner) == "<Runner 'shared': 'generate' on onnxruntime-cpu, 1 threads>"
