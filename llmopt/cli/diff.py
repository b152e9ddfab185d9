"""``llmopt diff``: what changed from one model to another, and not what is called otherwise."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

import click

from llmopt.cli.text import echo_json, size, table

if TYPE_CHECKING:
    from llmopt.ir.difference import Difference, NodeChange

SCHEMA = 1
_NUMBER: Final = re.compile(r"(?<![^./])\d+(?![^./])")
_SIGNS: Final = {"removed": "-", "added": "+", "changed": "~"}


@click.command("diff")
@click.argument("before")
@click.argument("after")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def diff_command(before: str, after: str, as_json: bool) -> int:  # noqa: FBT001 - click
    """Show what changed from BEFORE to AFTER.

    Each is an artifact, an .onnx file, its text (.ir), or a source. Compared are operators by
    module, attributes, shapes, inputs, outputs, and weights by digest; other names and another
    order are no change. Exit codes: 0 nothing changed, and nothing is printed; 1 something did.
    """
    from llmopt.comparison import compare

    found = compare(before, after)
    if as_json:
        echo_json({"schema": SCHEMA, "before": before, "after": after} | _data(found))
    elif not found.equal:
        click.echo(told(found))
    return 0 if found.equal else 1


def _data(found: Difference) -> dict[str, object]:
    return {
        "equal": found.equal,
        "edges": list(found.edges),
        "operators": {name: list(counts) for name, counts in found.operators.items()},
        "weights": dataclasses.asdict(found.weights),
        "changes": [dataclasses.asdict(change) for change in found.changes],
    }


def told(found: Difference) -> str:
    """Return a difference as people read it, layers that changed alike told once."""
    parts = ["\n".join(found.edges), _operators(found), _weights(found), *_modules(found.changes)]
    return "\n\n".join(filter(None, parts))


def _operators(found: Difference) -> str:
    changed = [(name, *pair) for name, pair in found.operators.items() if pair[0] != pair[1]]
    if not changed:
        return ""
    sums = [sum(pair[side] for pair in found.operators.values()) for side in (0, 1)]
    changed.append(("in all", sums[0], sums[1]))
    rows = [[name, str(old), str(new)] for name, old, new in changed]
    return table(["operator", "before", "after"], rows)


def _weights(found: Difference) -> str:
    weights = found.weights
    if weights.before == weights.after == weights.same:
        return ""
    return (
        f"weights: {weights.before} ({size(weights.before_bytes)}) before, "
        f"{weights.after} ({size(weights.after_bytes)}) after, {weights.same} of them the same"
    )


def _modules(changes: Iterable[NodeChange]) -> Iterator[str]:
    """Yield a paragraph for each module, or for the same one of several layers."""
    by_module: dict[tuple[str, str], list[NodeChange]] = defaultdict(list)
    for change in changes:
        by_module[change.component, change.scope].append(change)
    alike: dict[tuple[str, str, tuple[str, ...]], list[str]] = defaultdict(list)
    for (component, scope), own in by_module.items():
        alike[component, _NUMBER.sub("*", scope), tuple(_lines(own))].append(scope)
    for (component, template, lines), scopes in alike.items():
        title = _title(template, scopes) or "outside of modules"
        yield "\n".join([f"{component}: {title}" if component else title, *lines])


def _lines(changes: Sequence[NodeChange]) -> list[str]:
    counts = Counter((_SIGNS[c.kind], c.operator, c.details) for c in changes)
    lines = []
    for (sign, operator, details), count in sorted(counts.items(), key=_order):
        times = f"{count} x " if count > 1 else ""
        colon = ":" if sign == "~" else ""
        lines.append(f"  {sign} {times}{operator}{colon} {', '.join(details)}".rstrip(" "))
    return lines


def _order(item: tuple[tuple[str, str, tuple[str, ...]], int]) -> tuple[int, str, tuple[str, ...]]:
    (sign, operator, details), _ = item
    return list(_SIGNS.values()).index(sign), operator, details


def _title(template: str, scopes: Sequence[str]) -> str:
    """Return the name of a module with the numbers that it stands for.

    >>> _title("layers.*.mlp", ["layers.0.mlp", "layers.1.mlp", "layers.3.mlp"])
    'layers.0-1,3.mlp (3 x)'
    """
    if len(scopes) == 1:
        return scopes[0]
    columns = zip(*([int(n) for n in _NUMBER.findall(scope)] for scope in scopes), strict=True)
    ranges = [_ranges(sorted(set(column))) for column in columns]
    for text in ranges:
        template = template.replace("*", text, 1)
    return f"{template} ({len(scopes)} x)"


def _ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers in short.

    >>> _ranges([0, 1, 2, 4])
    '0-2,4'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
