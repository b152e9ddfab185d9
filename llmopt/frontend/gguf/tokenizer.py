"""Hugging Face tokenizer files from the vocabulary in a GGUF file's metadata.

A GGUF file names the kind of tokenizer and lists its tokens; how a kind splits text and writes
spaces is known by name only. Token ids equal those of transformers for the same file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from llmopt.errors import SourceError
from llmopt.frontend.gguf.file import GgufFile
from llmopt.frontend.gguf.wordpiece import wordpiece

_LOG = logging.getLogger("llmopt")
_CONTROL, _USER_DEFINED = 3, 4  # token types; the others need nothing
_SPACE = "\u2581"  # how SentencePiece writes a space
_AGAIN = "convert it again"
_NAMED = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",  # spelled so in the format
    "cls_token": "cls",
    "mask_token": "mask",
}
# how text is split before byte-level merges; "" is GPT-2's own, built into the library
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: Mapping[str, str] = {
    # also what transformers does for these; llama.cpp isolates every digit in the SmolLM kinds,
    # which differs only where two or more spaces stand before a number
    **dict.fromkeys(("default", "gpt-2", "smollm", "refact", "granite-code"), ""),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _TEKKEN,
}


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary in a GGUF file.

    Attributes:
        file: The file.
        tokens: Every token; its index is its id.
        types: ggml type of each token: 1 normal, 2 unknown, 3 control, 4 user-defined, 6 byte.
    """

    file: GgufFile
    tokens: list[str]
    types: list[int]

    def get(self, key: str, default: Any = None) -> Any:
        """Return ``tokenizer.ggml.<key>``."""
        return self.file.metadata.get(f"tokenizer.ggml.{key}", default)

    def named(self) -> dict[str, str]:
        """Return the role of each special token, ``"bos_token"`` and so on, with its text."""
        special: dict[str, str] = {}
        for role, key in _NAMED.items():
            number = self.get(f"{key}_token_id")
            if number is None:
                continue
            if not 0 <= number < len(self.tokens):
                problem = f"{role} is token {number} of {len(self.tokens)}"
                raise SourceError(self.file.path, problem, _AGAIN)
            special[role] = self.tokens[number]
        return special


def gguf_tokenizer(file: GgufFile) -> dict[str, bytes]:
    """Return tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Raises:
        SourceError: The vocabulary is missing or contradicts itself.
        UnsupportedModelError: The kind of tokenizer is unknown.
    """
    vocabulary = read_vocabulary(file)
    kind = vocabulary.get("model")
    if kind not in _KINDS:
        raise file.unsupported(f"tokenizer {kind!r} (known: {', '.join(_KINDS)})")
    tokenizer = _KINDS[kind](vocabulary)
    config = _tokenizer_config(vocabulary, kind)
    if kind != "bert":
        tokenizer.post_processor = _ends(vocabulary, config)
    return {
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(vocabulary.named()),
    }


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """Return the token table.

    Raises:
        SourceError: The table is missing, or its columns differ in length.
    """
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise SourceError(file.path, "has no vocabulary (tokenizer.ggml.tokens)", _AGAIN)
    types = file.metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(types) != len(tokens):
        problem = f"has {len(tokens)} tokens and {len(types)} token types"
        raise SourceError(file.path, problem, _AGAIN)
    return Vocabulary(file, tokens, types)


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _tokenizer_config(vocabulary: Vocabulary, kind: str) -> dict[str, Any]:
    """Return tokenizer_config.json; SentencePiece files without a flag mean a leading BOS."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": vocabulary.file.number("context_length", 1 << 30),
        **vocabulary.named(),
    }
    if kind != "bert":
        config["add_bos_token"] = vocabulary.get("add_bos_token", kind == "llama")
        config["add_eos_token"] = vocabulary.get("add_eos_token", False)
    template = vocabulary.file.metadata.get("tokenizer.chat_template")
    return config | ({"chat_template": template} if template else {})


def _ends(vocabulary: Vocabulary, config: Mapping[str, Any]) -> Any:
    """Return the post-processor that adds BOS before and EOS after, as configured."""
    bos, eos = (
        config.get(f"{end}_token") if config[f"add_{end}_token"] else None for end in ("bos", "eos")
    )
    used = [token for token in (bos, eos) if token]
    if not used:
        return None
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    pair = [*single, *(f"{piece}:1" for piece in single[:-1]), f"{single[-1]}:1"]
    pair = [piece.replace("$A:1", "$B:1") for piece in pair]
    ids = [(token, vocabulary.tokens.index(token)) for token in dict.fromkeys(used)]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    """Return a byte-level BPE tokenizer, GPT-2's kind."""
    alphabet = byte_alphabet()
    spelled = set(alphabet.values())
    verbatim = {_CONTROL, _USER_DEFINED}
    tokens = [
        token if kind in verbatim or spelled.issuperset(token) else _spell(token, alphabet)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = _listed_merges(vocabulary, vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = _split(vocabulary)
    tokenizer.decoder = decoders.ByteLevel()
    return _add_special_tokens(tokenizer, vocabulary)


def byte_alphabet() -> dict[int, str]:
    """Return byte -> its character in a byte-level vocabulary.

    Printable Latin-1 stands for itself; the other bytes, in order, for U+0100 and on.

    Source: Radford et al. (2019), GPT-2, ``bytes_to_unicode``.

    >>> byte_alphabet()[ord("a")], byte_alphabet()[ord(" ")]
    ('a', 'Ġ')
    """
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [byte for byte in range(256) if byte not in itself]
    others = {byte: chr(256 + index) for index, byte in enumerate(moved)}
    return {byte: others.get(byte, chr(byte)) for byte in range(256)}


def _spell(token: str, alphabet: Mapping[int, str]) -> str:
    return "".join(alphabet[byte] for byte in token.encode())


def _split(vocabulary: Vocabulary) -> Any:
    """Return the pre-tokenizer that ``tokenizer.ggml.pre`` names."""
    name = vocabulary.get("pre", "default")
    if name not in SPLITS:
        _LOG.warning(
            "%s: unknown tokenizer.ggml.pre %r, text is split like GPT-2's; "
            "token ids may differ from the original's",
            vocabulary.file.path,
            name,
        )
    pattern = SPLITS.get(name, "")
    if not pattern:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """Return a SentencePiece BPE tokenizer with byte fallback, Llama 2's kind."""
    architecture = vocabulary.file.architecture
    gemma = architecture.startswith("gemma")
    tokens = [_respell(token) if gemma else token for token in vocabulary.tokens]
    vocab = {token: index for index, token in enumerate(tokens)}
    if vocabulary.get("merges") is not None:
        merges = _listed_merges(vocabulary, vocab)
    else:
        # Gemma's scores do not follow the order of its merges; the order of its tokens does
        by_id = [-float(index) for index in range(len(tokens))]
        merges = implied_merges(vocab, by_id if gemma else _scores(vocabulary))
    unknown = vocabulary.named().get("unk_token", "<unk>") if gemma else None
    model = models.BPE(
        vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token=unknown
    )
    tokenizer = Tokenizer(model)
    prefix = not gemma and bool(vocabulary.get("add_space_prefix", True))
    _write_spaces(tokenizer, architecture, prefix=prefix)
    return _add_special_tokens(tokenizer, vocabulary)


def _respell(token: str) -> str:
    """Return a run of spaces, as Gemma files store it, in the model's spelling."""
    return _SPACE * len(token) if " " in token and not token.strip() else token


def _scores(vocabulary: Vocabulary) -> list[float]:
    scores = vocabulary.get("scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        problem = "has neither merges nor one score for each token"
        raise SourceError(vocabulary.file.path, problem, _AGAIN)
    return scores


def _write_spaces(tokenizer: Tokenizer, architecture: str, *, prefix: bool) -> None:
    """Set how spaces become U+2581 and back, and whether one is prepended to the text."""
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    replace = normalizers.Replace(" ", _SPACE)
    if architecture.startswith("gemma"):
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    elif architecture == "phi3":  # its prefix comes even before a space, and after each special
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
    else:
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=_SPACE, prepend_scheme=scheme, split=False
        )


def implied_merges(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Return the merges of a SentencePiece vocabulary, best first.

    Every split of a token into two tokens is a merge, ranked by the token's score, then by longer
    left and right parts, then by smaller ids.

    >>> implied_merges({"a": 0, "b": 1, "ab": 2, "abb": 3}, [0.0, 0.0, -1.0, -2.0])
    [('a', 'b'), ('ab', 'b')]
    """
    ranked = []
    for token, number in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                rank = (-scores[number], -cut, cut - len(token), number, vocab[left], vocab[right])
                ranked.append((rank, (left, right)))
    return [pair for _, pair in sorted(ranked)]


def _listed_merges(vocabulary: Vocabulary, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for line in vocabulary.get("merges", ()):
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            problem = f"the merge {line!r} has a token that is not in the vocabulary"
            raise SourceError(vocabulary.file.path, problem, _AGAIN)
        merges.append((left, right))
    if not merges:
        raise SourceError(vocabulary.file.path, "has no merges", _AGAIN)
    return merges


def _add_special_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> Tokenizer:
    """Register the tokens that are matched before the text is split."""
    roles = set(vocabulary.named().values())
    typed = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    special = [token for token, kind in typed if kind == _CONTROL or token in roles]
    plain = [token for token, kind in typed if kind == _USER_DEFINED and token not in roles]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special]
    )
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain if token in known])
    return tokenizer


def _wordpiece(vocabulary: Vocabulary) -> Tokenizer:
    return wordpiece(vocabulary.file.path, vocabulary.tokens, vocabulary.types, vocabulary.named())


_KINDS: dict[str, Callable[[Vocabulary], Tokenizer]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "bert": _wordpiece,
}
