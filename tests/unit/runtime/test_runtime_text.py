"""Text out of tokens, and where it stops."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_artifacts import write_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from llmopt.errors import ArtifactError, UsageError
from llmopt.runtime.detokenizer import Detokenizer, StopText
from llmopt.runtime.tokenizer import Tokenizer, pad


def decode_bytes(tokens: list[int]) -> str:
    """Decode tokens that are bytes; those above are special and give nothing."""
    return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


def pieces(detokenizer: Detokenizer, tokens: list[int]) -> list[str]:
    return [*map(detokenizer.push, tokens), detokenizer.finish()]


@given(st.text(max_size=30), st.text(max_size=10))
def test_pieces_join_to_the_text(text: str, context: str) -> None:
    detokenizer = Detokenizer(decode_bytes, list(context.encode()))
    assert "".join(pieces(detokenizer, list(text.encode()))) == text


@given(st.lists(st.integers(0, 300), max_size=30))
def test_pieces_of_any_bytes_join_to_their_decoding(tokens: list[int]) -> None:
    assert "".join(pieces(Detokenizer(decode_bytes), tokens)) == decode_bytes(tokens)


def test_a_character_waits_until_it_is_whole() -> None:
    assert pieces(Detokenizer(decode_bytes), list("aé🙂".encode())) == [
        *("a", "", "é"),
        *("", "", "", "🙂"),
        "",
    ]


def test_a_character_that_never_becomes_whole_comes_at_the_end() -> None:
    assert (
        pieces(Detokenizer(decode_bytes), list("é".encode())[:1])[-1] == "\N{REPLACEMENT CHARACTER}"
    )


def test_the_space_in_front_of_a_first_word_is_kept() -> None:
    words = {"▁sky": 0, "▁is": 1, "▁blue": 2, "<0xC3>": 3, "<0xA9>": 4}
    backend = Backend(models.BPE(words, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    detokenizer = Detokenizer(backend.decode, [0, 1])
    assert "".join(pieces(detokenizer, [2, 3, 4, 1])) == " blueé is"
    assert "".join(pieces(Detokenizer(backend.decode), [2, 1])) == "blue is"


@settings(deadline=None)
@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_text_ends_where_the_first_stop_begins(text: str, stops: list[str]) -> None:
    stop = StopText(stops)
    shown = "".join(map(stop.push, text)) + stop.finish()
    # The first stop to be complete ends it, character by character.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    first = min((end for end, _ in ends), default=None)
    expected = text if first is None else text[: min(start for end, start in ends if end == first)]
    assert shown == expected
    assert stop.found == bool(ends)


def test_nothing_of_a_stop_is_shown_before_it_is_complete() -> None:
    stop = StopText(["END"])
    assert [stop.push(text) for text in ("one E", "N", "x E", "ND more", "later")] == [
        *("one ", "", "ENx ", "", ""),
    ]


def test_padding_goes_to_its_side() -> None:
    tokens, mask = pad([[1], [2, 3]], 9, "right")
    assert tokens.tolist() == [[1, 9], [2, 3]]
    assert mask.tolist() == [[1, 0], [1, 1]]
    assert pad([[1], [2, 3]], 9, "left")[1].tolist() == [[0, 1], [1, 1]]
    assert pad([], 9, "left")[0].shape == (0, 0)


def test_the_file_s_own_padding_and_truncation_are_off(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("hi") == [104, 105]
    assert len(tokenizer.encode("long " * 10)) == 50
    assert tokenizer.encode_all(["abc", "de"], 2) == ([[97, 98], [100, 101]], 1)
    assert len(tokenizer.encode("long " * 10)) == 50
    assert tokenizer.decode([104, 256, 105]) == "hi"


def test_a_missing_tokenizer_and_a_bad_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="token ids and not text"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not a tokenizer"):
        Tokenizer(tmp_path)
