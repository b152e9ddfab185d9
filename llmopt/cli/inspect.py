"""``llmopt inspect``: what an artifact, an ONNX file or a checkpoint holds, weights unread."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmopt.cli.artifacts import is_artifact, is_bundle
from llmopt.cli.text import digits, echo_json, fields, size, table
from llmopt.errors import SourceError, SourceNotFoundError

if TYPE_CHECKING:
    from llmopt.interface.signature import Signature

SCHEMA = 1
_KINDS = (
    "give an artifact, a bundle, an .onnx file, a .gguf file, .safetensors, "
    "or a Hugging Face folder"
)


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def inspect_command(path: Path, as_json: bool) -> None:  # noqa: FBT001 - click
    """Show what PATH holds, without reading its weights.

    PATH is an artifact, a bundle, an .onnx or .gguf file, or a Hugging Face folder.
    """
    if not path.exists():
        raise SourceNotFoundError(path, _KINDS)
    if is_bundle(path):
        from llmopt.cli.bundle import show

        show(path, as_json=as_json)
    elif is_artifact(path):
        _artifact(path, as_json=as_json)
    elif path.suffix == ".onnx":
        _onnx(path, as_json=as_json)
    else:
        _checkpoint(path, as_json=as_json)


def _artifact(path: Path, *, as_json: bool) -> None:
    import json

    from llmopt.artifact.manifest import Manifest
    from llmopt.cli.summary import precision, quality, verification

    manifest = Manifest.read(path)
    manifest.check_sizes(path)
    if as_json:
        data = {"schema": SCHEMA, "kind": "artifact", "manifest": json.loads(manifest.to_json())}
        echo_json(data)
        return
    model = manifest.model
    total = sum(record.size_bytes for record in manifest.files)
    pairs = [
        ("artifact", str(path)),
        ("target", manifest.target),
        ("task", manifest.task),
        ("source", f"{manifest.source.name} ({manifest.source.kind})"),
        ("size", size(total) + precision(manifest.precision)),
        ("family", model.family),
        ("shape", _shape(vars(model))),
        ("made with", ", ".join(f"{k} {v}" for k, v in sorted(manifest.versions.items()))),
        ("pipeline", manifest.pipeline),
        ("verified", verification(manifest.verification)),
        ("quality", quality(manifest.quality) if manifest.quality else ""),
    ]
    click.echo(fields([pair for pair in pairs if pair[1]]))
    signature = manifest.signature
    for further in manifest.components:
        click.echo(f"\n{further.name} ({further.entry})\n" + _ports(further.signature))
    click.echo("\n" + _ports(signature))
    if model.layers > 1 and signature.has_cache:
        click.echo(f"(caches of layer 0 stand for those of all {model.layers} layers)")
    files = [[record.path, size(record.size_bytes)] for record in manifest.files]
    click.echo("\n" + table(["file", "size"], files))


def _ports(signature: Signature) -> str:
    ports = [("in", p) for p in signature.inputs] + [("out", p) for p in signature.outputs]
    rows = [
        [side, port.name, port.dtype, f"[{', '.join(map(str, port.shape))}]", port.role]
        for side, port in ports
        if not port.layer
    ]
    return table(["", "name", "type", "shape", "meaning"], rows)


def _shape(facts: dict[str, Any]) -> str:
    names = {
        "layers": "layers",
        "heads": "heads",
        "kv_heads": "key/value heads",
        "hidden": "hidden",
        "vocabulary": "vocabulary",
        "max_length": "max length",
    }
    return ", ".join(f"{word} {facts[key]}" for key, word in names.items() if facts.get(key))


def _onnx(path: Path, *, as_json: bool) -> None:
    from llmopt.frontend.contents import onnx_contents

    found = onnx_contents(path)
    if as_json:
        echo_json({"schema": SCHEMA} | found)
        return
    pairs = [
        ("file", str(path)),
        ("opsets", ", ".join(f"{k or 'ai.onnx'} {v}" for k, v in found["opsets"].items())),
        ("producer", found["producer"]),
        ("nodes", str(sum(found["operators"].values()))),
        ("weights", f"{found['weights']}, {_count(found['parameters'])}"),
        ("inputs", "; ".join(found["inputs"])),
        ("outputs", "; ".join(found["outputs"])),
    ]
    click.echo(fields([pair for pair in pairs if pair[1]]))
    rows = [[name, str(count)] for name, count in found["operators"].items()]
    click.echo("\n" + table(["operator", "count"], rows))
    click.echo("\n" + _types(found["types"]))


def _checkpoint(path: Path, *, as_json: bool) -> None:
    from llmopt.frontend.contents import checkpoint_contents

    if path.is_file() and path.suffix not in {".gguf", ".safetensors", ".bin", ".json"}:
        raise SourceError(path, "not a kind of file that can be inspected", _KINDS)
    found = checkpoint_contents(path)
    if as_json:
        echo_json({"schema": SCHEMA} | found)
        return
    pairs = [
        ("checkpoint", str(path)),
        ("architecture", found["architecture"]),
        ("shape", _shape(found)),
        ("tensors", str(found["tensors"])),
        ("parameters", _count(found["parameters"])),
        ("compiles", found["compiles"]),
    ]
    click.echo(fields([pair for pair in pairs if pair[1]]))
    click.echo("\n" + _types(found["types"]))


def _types(types: dict[str, dict[str, int]]) -> str:
    rows = [[name, str(t["tensors"]), _count(t["parameters"])] for name, t in types.items()]
    return table(["type", "tensors", "parameters"], rows)


def _count(number: int) -> str:
    """Return a count as people say it.

    >>> _count(134_515_008), _count(512)
    ('135 M', '512')
    """
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{digits(number / factor)} {unit}"
    return str(number)
