"""Signatures and facts of models, read from manifests."""

from __future__ import annotations

from llmopt.artifact.fields import Fields
from llmopt.interface.facts import CacheKind, ModelFacts, SourceRecord
from llmopt.interface.signature import Port, Role, Signature


def read_signature(data: Fields) -> Signature:
    """Return the signature written as ``data``.

    Raises:
        ArtifactError: A key is missing or of another type, or a role is unknown.
    """
    ports = {key: tuple(map(_port, data.items(key))) for key in ("inputs", "outputs")}
    return Signature(ports["inputs"], ports["outputs"])


def read_source(data: Fields) -> SourceRecord:
    """Return the record of a source written as ``data``."""
    return SourceRecord(data.text("name", ""), data.text("kind", ""), data.text("digest", ""))


def read_facts(data: Fields) -> ModelFacts:
    """Return the facts written as ``data``."""
    return ModelFacts(
        family=data.text("family", ""),
        layers=data.number("layers", 0),
        heads=data.number("heads", 0),
        kv_heads=data.number("kv_heads", 0),
        head_width=data.number("head_width", 0),
        hidden=data.number("hidden", 0),
        vocabulary=data.number("vocabulary", 0),
        max_length=data.number("max_length", 0),
        max_source=data.number("max_source", 0),
        source_vocabulary=data.number("source_vocabulary", 0),
        start=data.maybe_number("start"),
        image_token=data.maybe_number("image_token"),
        image_length=data.number("image_length", 0),
        bos=data.maybe_number("bos"),
        eos=data.numbers("eos"),
        pad=data.maybe_number("pad"),
        cache=_cache_kind(data),
        pooling=data.maybe_text("pooling"),
    )


def _port(data: Fields) -> Port:
    return Port(
        data.text("name"),
        _role(data),
        data.text("dtype"),
        data.dimensions("shape"),
        data.maybe_number("layer"),
    )


def _role(data: Fields) -> Role:
    text = data.text("role")
    if text not in set(Role):
        raise data.bad("role", f"a known role, not {text!r}; a newer llmopt wrote it")
    return Role(text)


def _cache_kind(data: Fields) -> CacheKind:
    match data.text("cache", "none"):
        case "shared":
            return "shared"
        case "concat":
            return "concat"
        case "none":
            return "none"
        case other:
            raise data.bad("cache", f"'shared', 'concat' or 'none', not {other!r}")
