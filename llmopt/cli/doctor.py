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

SCHEMA = 1
PACKAGES: Final[Mapping[str, tuple[str, str]]] = {
    "llmopt": ("", ""),
    "click": ("nothing works", "llmopt"),
    "numpy": ("nothing works", "llmopt"),
    "tokenizers": ("no text input or output: run --prompt and --text", "llmopt"),
    "onnxruntime": ("onnxruntime artifacts neither run nor are verified", "llmopt[runtime]"),
    "torch": ("nothing compiles", "llmopt[compile]"),
    "onnx": ("nothing compiles", "llmopt[compile]"),
    "onnx-ir": ("nothing compiles", "llmopt[compile]"),
    "onnxscript": ("nothing compiles", "llmopt[compile]"),
    "ml-dtypes": ("nothing compiles", "llmopt[compile]"),
    "gguf": ("GGUF files are not read", "llmopt[compile]"),
    "jinja2": ("chat templates are not converted", "llmopt[compile]"),
    "transformers": (
        "Hugging Face folders compile for built-in families only",
        "llmopt[transformers]",
    ),
}
"""What does not work without each package, and what to install for it."""


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
                "install": f"pip install '{extra}'" if extra else "",
            }
            for name, (cost, extra) in PACKAGES.items()
        ],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cost(package: Mapping[str, Any]) -> str:
    if package["version"] is not None:
        return str(package["without_it"])
    return f"{package['without_it']}; {package['install']}"
