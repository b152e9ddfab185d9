"""``llmopt targets`` and ``llmopt passes``: what can be chosen from."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import click

from llmopt.cli.text import echo_json, table

SCHEMA = 1


@click.command("targets")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def targets_command(as_json: bool) -> None:  # noqa: FBT001 - click
    """List the targets, and whether each builds and runs here."""
    from llmopt.backends import ALIASES, known_backends

    found = []
    for name, cls in known_backends().items():
        here = cls().available()
        found.append(
            {
                "name": name,
                "aliases": [alias for alias, target in ALIASES.items() if target == name],
                "summary": cls.summary,
                "schemes": sorted(cls.schemes),
                "builds": not here.builds,
                "runs": not here.runs,
                "missing": [text for text in (here.builds, here.runs) if text],
            }
        )
    if as_json:
        echo_json({"schema": SCHEMA, "targets": found})
        return
    click.echo(table(_TARGETS, [_target_row(target) for target in found]))


_TARGETS = ("target", "alias", "builds here", "runs here", "schemes", "what it is")


def _target_row(target: dict[str, Any]) -> list[str]:
    yes_no = {True: "yes", False: "no"}
    missing = f" (missing: {'; '.join(target['missing'])})" if target["missing"] else ""
    return [
        target["name"],
        " ".join(target["aliases"]),
        yes_no[target["builds"]],
        yes_no[target["runs"]],
        " ".join(target["schemes"]),
        target["summary"] + missing,
    ]


@click.command("passes")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def passes_command(as_json: bool) -> None:  # noqa: FBT001 - click
    """List the passes and their options."""
    from llmopt.passes import DEFAULT, known_passes

    found: list[dict[str, Any]] = [
        {
            "name": name,
            "default": name in DEFAULT,
            "options": _options(cls),
            "summary": _first_line(cls),
        }
        for name, cls in sorted(known_passes().items())
    ]
    if as_json:
        echo_json({"schema": SCHEMA, "default": list(DEFAULT), "passes": found})
        return
    rows = [[each["name"], " ".join(each["options"]), each["summary"]] for each in found]
    click.echo(table(["pass", "options", "what it does"], rows))
    click.echo(f"\ndefault = {','.join(DEFAULT)}")


def _options(cls: type[Any]) -> list[str]:
    if not dataclasses.is_dataclass(cls):
        return []
    return [f"{field.name}={field.default}" for field in dataclasses.fields(cls)]


def _first_line(cls: type[Any]) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]
