"""Words that may not come back: ``python tests/ci/words.py PATH...`` prints each, and fails if any.

Three rules of ``docs/glossary.md``, checked on Python files and Markdown pages:

* parameters, fields, classes, public functions and files are not named by an everyday word where
  the field has a term;
* a line of ``Args:`` begins with a noun, an article or *whether*, never with a pronoun;
* no text has a phrase that no native engineer writes.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

NAMES: Final = frozenset(
    {"asked", "beside", "found", "given", "held", "made", "met", "place", "places", "rewriting"}
    | {"seeing", "shown", "told", "turn", "turned", "turning", "whole"}
)
"""Parts of names that could mean anything."""

ALLOWED: Final = frozenset({"SourceNotFoundError", "connection_made"})
"""Names that are the field's or a library's."""

PRONOUNS: Final = frozenset(
    {"as", "for", "from", "how", "in", "it", "its", "likewise", "nothing", "of", "one", "that"}
    | {"them", "these", "they", "this", "those", "to", "what", "when", "where", "which", "who"}
    | {"whose", "why"}
)
"""Words that an argument is not described with first."""

PHRASES: Final = re.compile(
    r"\b(?:it is none|they are none|is none;|so many\b(?! that)|(?:is|are|be) told|found out|"
    r"see(?:s|ing)? images|writes? down speech|is said to an?|for processors|on processors|"
    r"(?:is|are) of no kind|has no such[.;\"']|leaves? \w+ away)"
)
"""Phrases that a native engineer would not write."""

_ENTRY: Final = re.compile(r"^ {4}\*{0,2}(\w+): (\w+)", re.MULTILINE)
_CODE: Final = re.compile(r"^(```+).*?^\1|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def words(name: str) -> set[str]:
    """Return the parts of a name in lower case.

    >>> sorted(words("_PlaceOf_all"))
    ['all', 'of', 'place']
    """
    return {part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of everything that a caller spells, or a reader looks for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.lineno, node.name
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    yield field.lineno, field.target.id
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not node.name.startswith("_"):
                yield node.lineno, node.name
            every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            yield from ((each.lineno, each.arg) for each in every)


def arguments(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Yield the line of a docstring, a name in its ``Args`` and the first word said of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            section = (ast.get_docstring(node) or "").partition("\nArgs:\n")[2]
            section = re.split(r"\n(?=\w+:\n)", section)[0]
            for name, first in _ENTRY.findall(section):
                yield node.lineno, name, first


def python(path: Path) -> Iterator[str]:
    """Yield what is wrong with a Python file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if banned := words(path.stem) & NAMES:
        yield f"{path}:1: file named by {', '.join(banned)!r}"
    for line, name in names(tree):
        if name not in ALLOWED and (banned := words(name) & NAMES):
            yield f"{path}:{line}: {name!r} is named by {', '.join(banned)!r}"
    for line, name, first in arguments(tree):
        if first.lower() in PRONOUNS:
            yield f"{path}:{line}: argument {name!r} is described with {first!r} first"
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from _phrases(path, node.value, node.lineno)


def page(path: Path) -> Iterator[str]:
    """Yield what is wrong with a Markdown page, code aside."""
    text = path.read_text(encoding="utf-8")
    yield from _phrases(path, _CODE.sub(lambda code: "\n" * code[0].count("\n"), text), 1)


def _phrases(path: Path, text: str, line: int) -> Iterator[str]:
    for match in PHRASES.finditer(text):
        yield f"{path}:{line + text.count(chr(10), 0, match.start())}: says {match[0]!r}"


def main(arguments_: list[str]) -> int:
    """Print what is wrong with the files below each path; return 1 if anything is."""
    problems: list[str] = []
    for root in map(Path, arguments_):
        files = sorted(root.rglob("*")) if root.is_dir() else [root]
        for path in files:
            if path.suffix == ".py":
                problems.extend(python(path))
            elif path.suffix == ".md" and "_build" not in path.parts:
                problems.extend(page(path))
    sys.stdout.write("".join(f"{problem}\n" for problem in problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
