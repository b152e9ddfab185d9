"""``llmopt doctor``: this machine's hardware, and what each missing package disables."""

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
    "tokenizers": "no text input or output: run --prompt and --text",
    "onnxruntime": "onnxruntime artifacts neither run nor are verified",
    "torch": "nothing compiles",
    "onnx": "nothing compiles",
    "onnx-ir": "nothing compiles",
    "onnxscript": "nothing compiles",
    "ml-dtypes": "nothing compiles",
    "gguf": "GGUF files are not read",
    "jinja2": "chat templates are not converted",
    "transformers": "Hugging Face folders compile for built-in families only",
}
"""What does not work without each package."""


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def doctor_command(as_json: bool) -> None:  # noqa: FBT001 - click
    """Show this machine's hardware and packages, and what is missing."""
    report = examine(Path.cwd())
    if as_json:
        echo_json({"schema": SCHEMA} | report)
        return
    machine = report["machine"]
    memory = machine["memory_bytes"]
    pairs = [
        ("python", machine["versions"]["python"]),
        ("system", f"{machine['system']}, {machine['architecture']}"),
        ("CPU", machine["processor"]),
        ("cores allowed", str(machine["cores"])),
        ("features", " ".join(machine["features"]) or "none that kernels use"),
        ("memory", "unknown" if memory is None else size(memory)),
        ("disk", f"{size(report['disk_free_bytes'])} free in {report['folder']}"),
    ]
    click.echo(fields(pairs))
    rows = [[p["name"], p["version"] or "missing", _cost(p)] for p in report["packages"]]
    click.echo("\n" + table(["package", "version", "without it"], rows))


def examine(folder: Path) -> dict[str, Any]:
    """Return the ``--json`` report; free disk space is that of ``folder``."""
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
