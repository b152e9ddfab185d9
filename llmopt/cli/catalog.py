"""``llmopt targets`` and ``llmopt passes``: what can be chosen from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from llmopt.cli.plugins import plugin_option
from llmopt.cli.text import echo_json, table

if TYPE_CHECKING:
    from llmopt.passes.base import Pass

SCHEMA = 1
_ARGS = re.compile(r"\n*^Args:\n(?:[ ]+[^\n]*\n?|\n)+", re.MULTILINE)


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
@click.argument("name", required=False)
@plugin_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def passes_command(name: str | None, plugins: tuple[str, ...], as_json: bool) -> None:  # noqa: FBT001 - click
    """List the passes and their options, or describe NAME."""
    from llmopt.passes import DEFAULT
    from llmopt.passes.plugins import passes_with

    known = passes_with(plugins)
    if name is not None:
        _describe(_known(known, name), as_json=as_json)
        return
    found = [_summary(cls) for _, cls in sorted(known.items())]
    if as_json:
        echo_json({"schema": SCHEMA, "default": list(DEFAULT), "passes": found})
        return
    rows = [[each["name"], " ".join(each["options"]), each["summary"]] for each in found]
    click.echo(table(["pass", "options", "what it does"], rows))
    click.echo(f"\ndefault = {','.join(DEFAULT)}")


def _known(known: Mapping[str, type[Pass]], name: str) -> type[Pass]:
    from llmopt.errors import UnknownNameError

    if name not in known:
        raise UnknownNameError("pass", name, known, "--plugin adds yours")
    return known[name]


def _summary(cls: type[Pass]) -> dict[str, Any]:
    from llmopt.passes import DEFAULT
    from llmopt.spelling import MISSING, options_of, spell_value

    return {
        "name": cls.name,
        "default": cls.name in DEFAULT,
        "options": [
            f"{o.name}={'' if o.default is MISSING else spell_value(o.default)}"
            for o in options_of(cls)
        ],
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
    }


def _describe(cls: type[Pass], *, as_json: bool) -> None:
    from llmopt.origin import defined_at, is_ours
    from llmopt.spelling import MISSING, options_of, spell_value

    place = "llmopt" if is_ours(cls) else defined_at(cls)
    text = _ARGS.sub("\n", inspect.getdoc(cls) or "")
    options: list[dict[str, Any]] = [
        {
            "name": option.name,
            "type": option.expected,
            "default": None if option.default is MISSING else spell_value(option.default),
            "text": option.text,
        }
        for option in options_of(cls)
    ]
    if as_json:
        more = {"from": place, "description": text.strip(), "options": options}
        echo_json({"schema": SCHEMA} | _summary(cls) | more)
        return
    rows = [
        [o["name"], o["type"], "needed" if o["default"] is None else o["default"], o["text"]]
        for o in options
    ]
    click.echo(f"{cls.name}, from {place}\n\n{text.strip() or 'It has no docstring.'}")
    if rows:
        click.echo(f"\n{table(['option', 'type', 'default', 'what it is'], rows)}")
    given = "{" + ",".join(f"{o['name']}={o['default'] or o['type']}" for o in options) + "}"
    click.echo(f"\nwritten as {cls.name}{given if rows else ''}")
