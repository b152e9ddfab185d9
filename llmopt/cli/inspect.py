"""``llmopt inspect``: the contents of an artifact, ONNX file or checkpoint, weights unread."""

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
    "give an artifact, a bundle, an .onnx, .gguf or .safetensors file, or a Hugging Face folder"
)


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def inspect_command(path: Path, as_json: bool) -> None:  # noqa: FBT001 - click
    """Show the contents of PATH without reading its weights.

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
        ("versions", ", ".join(f"{k} {v}" for k, v in sorted(manifest.versions.items()))),
        ("pipeline", manifest.pipeline),
        ("verified", verification(manifest.verification)),
        ("quality", quality(manifest.quality) if manifest.quality else ""),
    ]
    click.echo(fields([pair for pair in pairs if pair[1]]))
    signature = manifest.signature
    for component in manifest.components:
        click.echo(f"\n{component.name} ({component.entry})\n" + _ports(component.signature))
    click.echo("\n" + _ports(signature))
    if model.layers > 1 and signature.has_cache:
        click.echo(f"(the cache is listed for layer 0 of {model.layers}; the others are alike)")
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

    contents = onnx_contents(path)
    if as_json:
        echo_json({"schema": SCHEMA} | contents)
        return
    pairs = [
        ("file", str(path)),
        ("opsets", ", ".join(f"{k or 'ai.onnx'} {v}" for k, v in contents["opsets"].items())),
        ("producer", contents["producer"]),
        ("nodes", str(sum(contents["operators"].values()))),
        ("weights", f"{contents['weights']}, {_count(contents['parameters'])}"),
        ("inputs", "; ".join(contents["inputs"])),
        ("outputs", "; ".join(contents["outputs"])),
    ]
    click.echo(fields([pair for pair in pairs if pair[1]]))
    rows = [[name, str(count)] for name, count in contents["operators"].items()]
    click.echo("\n" + table(["operator", "count"], rows))
    click.echo("\n" + _types(contents["types"]))


def _checkpoint(path: Path, *, as_json: bool) -> None:
    from llmopt.frontend.contents import checkpoint_contents

    if path.is_file() and path.suffix not in {".gguf", ".safetensors", ".bin", ".json"}:
        raise SourceError(path, "unsupported kind of file", _KINDS)
    contents = checkpoint_contents(path)
    if as_json:
        echo_json({"schema": SCHEMA} | contents)
        return
    pairs = [
        ("checkpoint", str(path)),
        ("architecture", contents["architecture"]),
        ("shape", _shape(contents)),
        ("tensors", str(contents["tensors"])),
        ("parameters", _count(contents["parameters"])),
        ("compiles", contents["compiles"]),
    ]
    click.echo(fields([pair for pair in pairs if pair[1]]))
    click.echo("\n" + _types(contents["types"]))


def _types(types: dict[str, dict[str, int]]) -> str:
    rows = [[name, str(t["tensors"]), _count(t["parameters"])] for name, t in types.items()]
    return table(["type", "tensors", "parameters"], rows)


def _count(number: int) -> str:
    """Return a count with a unit.

    >>> _count(134_515_008), _count(512)
    ('135 M', '512')
    """
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{digits(number / factor)} {unit}"
    return str(number)
