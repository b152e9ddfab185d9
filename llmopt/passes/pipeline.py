"""A pipeline is text: the same on the command line, in the API, in manifests and in tests.

``"default"``, ``"canonicalize,fuse-norms"``, ``"default,-merge-gate-up,my-pass{limit=30}"``.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from typing_extensions import override

from llmopt.errors import LlmoptError, PassError, UnknownNameError, UsageError
from llmopt.ir import dialect
from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes.base import Miss, Outcome, Pass

_ITEM: Final = re.compile(r"(?P<minus>-?)(?P<name>[A-Za-z0-9_-]+)(?:\{(?P<options>[^{}]*)\})?\Z")
_SPLIT: Final = re.compile(r",(?![^{}]*\})")


@dataclass(frozen=True)
class Ran:
    """One pass of a pipeline that was run.

    Args:
        name: The pass.
        applied: How many changes it made.
        missed: What it declined, with reasons.
        duration_s: Seconds it took.
    """

    name: str
    applied: int
    missed: tuple[Miss, ...]
    duration_s: float


@dataclass(frozen=True)
class Pipeline:
    """Passes in order.

    Args:
        passes: The passes.
    """

    passes: tuple[Pass, ...]

    @staticmethod
    def parse(
        text: str,
        *,
        default: Sequence[str] | None = None,
        known: Mapping[str, type[Pass]] | None = None,
    ) -> Pipeline:
        """Return the pipeline that ``text`` names.

        Args:
            text: Pass names, comma-separated, options in braces; ``default`` stands for the
                default passes and ``-name`` takes one of them away.
            default: What ``default`` stands for; the built-in list if not given.
            known: Passes by name; the built-in ones and those of plugins if not given.

        Raises:
            UnknownNameError: no such pass, or no such option of it.
            UsageError: the text is not of this form.
        """
        from llmopt.passes import DEFAULT, known_passes

        table = known_passes() if known is None else known
        items: list[str] = []
        for item in items_of(text):
            if item == "default":
                items.extend(DEFAULT if default is None else default)
            elif item.startswith("-"):
                items = _without(items, item[1:], table)
            else:
                items.append(item)
        return Pipeline(tuple(make(item, table) for item in items))

    @override
    def __str__(self) -> str:
        """Return the text that parses to this pipeline."""
        return ",".join(spell(item) for item in self.passes)

    def run(
        self, program: Program, after: Callable[[Pass, Program, Ran], None] | None = None
    ) -> Program:
        """Run every pass on ``program`` in place and return it.

        Args:
            program: What to edit.
            after: Called after each pass: printing, timing and verifying are its business.

        Raises:
            PassError: a pass left the Program outside the dialect.
        """
        for item in self.passes:
            start = time.perf_counter()
            outcome = Outcome()
            for part in program.parts():
                found = self._step(item, part)
                outcome.hit(found.applied)
                outcome.missed += found.missed
                program.absorb(part)
            ran = Ran(
                item.name, outcome.applied, tuple(outcome.missed), time.perf_counter() - start
            )
            if after is not None:
                after(item, program, ran)
        return program

    @staticmethod
    def _step(item: Pass, program: Program) -> Outcome:
        edge = _edge(program)
        outcome = item.run(program)
        if outcome.modified:
            g.name_nodes(program.graph)
        if _edge(program) != edge and not item.changes_signature:
            raise PassError(item.name, "it changed the inputs or outputs")
        problems = dialect.verify(program.model) if outcome.modified and not item.lowers else []
        if problems:
            raise PassError(item.name, "; ".join(problems[:3]))
        return outcome


def items_of(text: str) -> list[str]:
    """Return the items of a pipeline's text.

    >>> items_of("default, -merge-qkv, my-pass{limit=3,deep=true}")
    ['default', '-merge-qkv', 'my-pass{limit=3,deep=true}']
    """
    return [item.strip() for item in _SPLIT.split(text.strip())] if text.strip() else []


def make(text: str, known: Mapping[str, type[Pass]]) -> Pass:
    """Return the pass that ``name{option=value,...}`` names."""
    match = _ITEM.match(text)
    if match is None or match["minus"]:
        raise UsageError(f"{text!r} is not a pass: write name or name{{option=value,...}}")
    if match["name"] not in known:
        raise UnknownNameError(
            "pass", match["name"], known, "`llmopt passes` describes each; --plugin adds yours"
        )
    cls = known[match["name"]]
    fields = {f.name: f for f in _options(cls)}
    options: dict[str, Any] = {}
    for pair in filter(None, (p.strip() for p in (match["options"] or "").split(","))):
        key, _, value = pair.partition("=")
        if key not in fields:
            raise UnknownNameError(f"option of pass {match['name']}", key, fields)
        options[key] = _convert(_kind(fields[key]), key, value)
    return cls(**options)


def spell(item: Pass) -> str:
    """Return the text that makes this pass again: only options that differ from the default."""
    changed = []
    for field in _options(type(item)):
        value = getattr(item, field.name)
        if value != field.default:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            changed.append(f"{field.name}={text}")
    return item.name + (f"{{{','.join(changed)}}}" if changed else "")


def _options(cls: type[Any]) -> tuple[dataclasses.Field[Any], ...]:
    """Return the options of a pass: its fields."""
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def _kind(field: dataclasses.Field[Any]) -> str:
    """Return the name of an option's type, written as text or as a class."""
    return field.type.__name__ if isinstance(field.type, type) else str(field.type)


def _convert(kind: str, key: str, text: str) -> Any:
    readers: dict[str, Callable[[str], Any]] = {
        "int": int,
        "float": float,
        "str": str,
        "bool": {"true": True, "false": False, "1": True, "0": False}.__getitem__,
    }
    try:
        return readers[kind](text)
    except (KeyError, ValueError):
        raise UsageError(f"option {key}={text!r}: expected {kind}") from None


def _without(items: list[str], name: str, known: Mapping[str, type[Pass]]) -> list[str]:
    if name not in known:
        raise UnknownNameError("pass", name, known, "only a pass that exists can be taken away")
    return [item for item in items if item.split("{")[0] != name]


def _edge(program: Program) -> list[tuple[str | None, str]]:
    graph = program.graph
    return [(v.name, str(v.dtype)) for v in (*graph.inputs, *graph.outputs)]


def load_plugin(path: str) -> dict[str, type[Pass]]:
    """Return the passes that a Python file or module defines.

    Raises:
        LlmoptError: it cannot be imported, or defines no pass.
    """
    import importlib
    import importlib.util
    import sys
    from pathlib import Path

    try:
        if path.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"llmopt_plugin_{Path(path).stem}", path)
            if spec is None or spec.loader is None or not Path(path).is_file():
                raise UsageError(f"--plugin {path}: no such file")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(path)
    except (ImportError, SyntaxError) as error:
        raise UsageError(f"--plugin {path}: cannot be imported: {error}") from error
    found = {
        value.name: value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Pass) and hasattr(value, "name")
    }
    if not found:
        raise LlmoptError(f"--plugin {path}: it defines no subclass of llmopt.Pass with a name")
    return found
