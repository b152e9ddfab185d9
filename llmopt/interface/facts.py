"""What is known of a model beside its graph: sizes, limits, special tokens, where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CacheKind = Literal["shared", "concat", "none"]


@dataclass(frozen=True)
class SourceRecord:
    """Where the model came from.

    Args:
        name: The file or folder's name, without the path to it.
        kind: ``"huggingface"``, ``"gguf"``, ``"onnx"``, ``"module"``, …
        digest: sha256 over the source, in hex.
    """

    name: str = ""
    kind: str = ""
    digest: str = ""


@dataclass(frozen=True)
class ModelFacts:
    """What a runner has to know of the model; 0 and None where it does not apply.

    Args:
        family: The architecture's name.
        layers: L.
        heads: H.
        kv_heads: G.
        head_width: D.
        hidden: E.
        vocabulary: V.
        max_length: Most tokens in one sequence, prompt included.
        bos: Token that begins a text.
        eos: Tokens that end one.
        pad: Token that fills up short rows.
        cache: ``"shared"``: past and present may be one buffer of fixed capacity that the model
            writes in place; ``"concat"``: present is past and the new tokens; ``"none"``.
        pooling: Pooling of hidden states into one embedding, where the model does not pool itself.
        max_source: Most tokens that can be read, of a model that writes another sequence.
        source_vocabulary: Tokens that it reads, where they are not those that it writes.
        start: Token that such a model's sequences begin with.
        image_token: Token in whose place a feature of an image goes, of a model that sees any.
        image_length: Number of image tokens of one image.
    """

    family: str = ""
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_width: int = 0
    hidden: int = 0
    vocabulary: int = 0
    max_length: int = 0
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    cache: CacheKind = "none"
    pooling: str | None = None
    max_source: int = 0
    source_vocabulary: int = 0
    start: int | None = None
    image_token: int | None = None
    image_length: int = 0
