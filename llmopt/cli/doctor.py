"""``llmopt doctor``: what this machine offers, and what each missing package costs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from llmopt.cli.text import echo_json, fields, size, table
from llmopt.lazy import EXTRAS

SCHEMA = 1
PACKAGES: Final[Mapping[str, str]] = {
    "llmopt": "",
    "click": "nothing works",
    "numpy": "nothing works",
    "tokenizers": "no text in or out: run --prompt and --text",
    "onnxruntime": "no artifact for onnxruntime runs or is verified",
    "torch": "nothing compiles",
    "onnx": "nothing compiles",
    "onnx-ir": "nothing compiles",
    "onnxscript": "nothing compiles",
    "ml-dtypes": "nothing compiles",
    "gguf": "GGUF files are not read",
    "jinja2": "chat templates are not converted",
    "transformers": "only known families of Hugging Face folders compile",
}
"""What is lost without each package."""


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def doctor_command(as_json: bool) -> None:  # noqa: FBT001 - click
    """Show what this machine has, and what is missing."""
    found = examine(Path.cwd())
    if as_json:
        echo_json({"schema": SCHEMA} | found)
        return
    machine = found["machine"]
    memory = machine["memory_bytes"]
    shown = [
        ("python", machine["versions"]["python"]),
        ("system", f"{machine['system']}, {machine['architecture']}"),
        ("processor", machine["processor"]),
        ("cores allowed", str(machine["cores"])),
        ("features", " ".join(machine["features"]) or "none that matter"),
        ("memory", "unknown" if memory is None else size(memory)),
        ("disk", f"{size(found['disk_free_bytes'])} free in {found['folder']}"),
    ]
    click.echo(fields(shown))
    rows = [[p["name"], p["version"] or "missing", _cost(p)] for p in found["packages"]]
    click.echo("\n" + table(["package", "version", "without it"], rows))


def examine(folder: Path) -> dict[str, Any]:
    """Return what ``--json`` shows; ``folder`` is where disk space is asked for."""
    from llmopt.benchmark.machine import this_machine

    return {
        "machine": dataclasses.asdict(this_machine()),
        "folder": str(folder),
        "disk_free_bytes": shutil.disk_usage(folder).free,
        "packages": [
            {
                "name": name,
                "version": _version(name),
                "without_it": cost,
                "install": _install(name) if cost else "",
            }
            for name, cost in PACKAGES.items()
        ],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _install(package: str) -> str:
    extra = EXTRAS.get(package.replace("-", "_"))
    return f"pip install 'llmopt[{extra}]'" if extra else "pip install llmopt"


def _cost(package: Mapping[str, Any]) -> str:
    if package["version"] is not None:
        return str(package["without_it"])
    return f"{package['without_it']}; {package['install']}"
