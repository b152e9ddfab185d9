"""BERT's WordPiece tokenizer from a GGUF vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from llmopt.errors import SourceError

_CONTROL = 3
_START = "\u2581"  # marks a word's start; Hugging Face marks the continuations instead


def wordpiece(
    path: Path, tokens: list[str], types: list[int], named: Mapping[str, str]
) -> Tokenizer:
    """Return the tokenizer; it lower-cases text if the vocabulary has no capitals.

    Raises:
        SourceError: The vocabulary lacks one of BERT's own tokens.
    """
    spelled = [_spell(token, kind) for token, kind in zip(tokens, types, strict=True)]
    vocab = {token: index for index, token in enumerate(spelled)}
    start = named.get("cls_token", "[CLS]")
    end = named.get("sep_token", "[SEP]")
    unknown = named.get("unk_token", "[UNK]")
    missing = [token for token in (start, end, unknown) if token not in vocab]
    if missing:
        raise SourceError(path, f"its vocabulary lacks {', '.join(missing)}", "convert it again")
    words = (token for token, kind in zip(spelled, types, strict=True) if kind != _CONTROL)
    # the file does not say whether the model is uncased
    lower = not any(word != word.lower() for word in words if not word.startswith("["))
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} $B:1 {end}:1",
        special_tokens=[(start, vocab[start]), (end, vocab[end])],
    )
    special = {token for token, kind in zip(spelled, types, strict=True) if kind == _CONTROL}
    special |= {token for token in named.values() if token in vocab}
    ordered = sorted(special, key=lambda token: vocab[token])
    tokenizer.add_special_tokens([AddedToken(each, normalized=False) for each in ordered])
    return tokenizer


def _spell(token: str, kind: int) -> str:
    if kind == _CONTROL or (token.startswith("[") and token.endswith("]")):
        return token
    return token[1:] if token.startswith(_START) else f"##{token}"
