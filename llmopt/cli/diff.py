"""``llmopt diff``: what changed from one model to another, apart from names and order."""

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

    Each is an artifact, an .onnx file, its text (.ir), or a source. Operators are compared by
    module, with attributes, shapes, inputs and outputs, and weights by digest; names and order
    are ignored. Exit codes: 0 no difference, and no output; 1 there are differences.
    """
    from llmopt.comparison import compare

    difference = compare(before, after)
    if as_json:
        echo_json({"schema": SCHEMA, "before": before, "after": after} | _data(difference))
    elif not difference.equal:
        click.echo(summary(difference))
    return 0 if difference.equal else 1


def _data(difference: Difference) -> dict[str, object]:
    return {
        "equal": difference.equal,
        "edges": list(difference.edges),
        "operators": {name: list(counts) for name, counts in difference.operators.items()},
        "weights": dataclasses.asdict(difference.weights),
        "changes": [dataclasses.asdict(change) for change in difference.changes],
    }


def summary(difference: Difference) -> str:
    """Return a difference as text, layers that changed alike listed once."""
    parts = [
        "\n".join(difference.edges),
        _operators(difference),
        _weights(difference),
        *_modules(difference.changes),
    ]
    return "\n\n".join(filter(None, parts))


def _operators(difference: Difference) -> str:
    changed = [(name, *pair) for name, pair in difference.operators.items() if pair[0] != pair[1]]
    if not changed:
        return ""
    sums = [sum(pair[side] for pair in difference.operators.values()) for side in (0, 1)]
    changed.append(("total", sums[0], sums[1]))
    rows = [[name, str(old), str(new)] for name, old, new in changed]
    return table(["operator", "before", "after"], rows)


def _weights(difference: Difference) -> str:
    weights = difference.weights
    if weights.before == weights.after == weights.same:
        return ""
    return (
        f"weights: {weights.before} ({size(weights.before_bytes)}) before, "
        f"{weights.after} ({size(weights.after_bytes)}) after, {weights.same} unchanged"
    )


def _modules(changes: Iterable[NodeChange]) -> Iterator[str]:
    """Yield a paragraph for each module; layers that changed alike share one."""
    by_module: dict[tuple[str, str], list[NodeChange]] = defaultdict(list)
    for change in changes:
        by_module[change.component, change.scope].append(change)
    alike: dict[tuple[str, str, tuple[str, ...]], list[str]] = defaultdict(list)
    for (component, scope), edits in by_module.items():
        alike[component, _NUMBER.sub("*", scope), tuple(_lines(edits))].append(scope)
    for (component, template, lines), scopes in alike.items():
        title = _title(template, scopes) or "outside modules"
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
    """Return the name of a module with the layer numbers that it covers.

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
    """Return sorted numbers as ranges.

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
