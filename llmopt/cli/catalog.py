"""``llmopt targets`` and ``llmopt passes``: the available targets and passes."""

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
    """List the targets, and whether each compiles and runs here."""
    from llmopt.backends import ALIASES, known_backends

    targets = []
    for name, cls in known_backends().items():
        here = cls().available()
        targets.append(
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
        echo_json({"schema": SCHEMA, "targets": targets})
        return
    click.echo(table(_TARGETS, [_target_row(target) for target in targets]))


_TARGETS = ("target", "alias", "builds here", "runs here", "schemes", "description")


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
    summaries = [_summary(cls) for _, cls in sorted(known.items())]
    if as_json:
        echo_json({"schema": SCHEMA, "default": list(DEFAULT), "passes": summaries})
        return
    rows = [[each["name"], " ".join(each["options"]), each["summary"]] for each in summaries]
    click.echo(table(["pass", "options", "description"], rows))
    click.echo(f"\ndefault = {','.join(DEFAULT)}")


def _known(known: Mapping[str, type[Pass]], name: str) -> type[Pass]:
    from llmopt.errors import UnknownNameError

    if name not in known:
        raise UnknownNameError("pass", name, known, "add your own with --plugin")
    return known[name]


def _summary(cls: type[Pass]) -> dict[str, Any]:
    from llmopt.passes import DEFAULT
    from llmopt.passes.options import MISSING, options_of, spell_value

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
    from llmopt.passes.options import MISSING, options_of, spell_value

    origin = "llmopt" if is_ours(cls) else defined_at(cls)
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
        more = {"from": origin, "description": text.strip(), "options": options}
        echo_json({"schema": SCHEMA} | _summary(cls) | more)
        return
    rows = [
        [o["name"], o["type"], "required" if o["default"] is None else o["default"], o["text"]]
        for o in options
    ]
    click.echo(f"{cls.name}, from {origin}\n\n{text.strip() or 'No docstring.'}")
    if rows:
        click.echo(f"\n{table(['option', 'type', 'default', 'description'], rows)}")
    spelled = "{" + ",".join(f"{o['name']}={o['default'] or o['type']}" for o in options) + "}"
    click.echo(f"\nspelled {cls.name}{spelled if rows else ''}")
