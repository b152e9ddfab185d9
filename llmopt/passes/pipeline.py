"""A pipeline is text: the same on the command line, in the API, in manifests and in tests.

``"default"``, ``"canonicalize,fuse-norms"``, ``"default,-merge-gate-up,my-pass{limit=30}"``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from typing_extensions import override

from llmopt import spelling
from llmopt.errors import UnknownNameError
from llmopt.ir import dialect
from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.origin import is_ours
from llmopt.passes.base import Miss, Outcome, Pass
from llmopt.passes.plugins import Plugin, invalid, passes_with, run_guarded
from llmopt.spelling import spell

Item = str | Pass
"""A pass, by its name and options or itself."""


@dataclass(frozen=True)
class Ran:
    """One pass of a pipeline that was run.

    Args:
        name: The pass.
        applied: Number of changes.
        missed: Candidates that it declined, with reasons.
        duration_s: Seconds it took.
        notes: Results of an analysis, a sentence each.
    """

    name: str
    applied: int
    missed: tuple[Miss, ...]
    duration_s: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pipeline:
    """Passes in order.

    Args:
        passes: The passes.
    """

    passes: tuple[Pass, ...]

    @staticmethod
    def parse(
        text: str | Sequence[Item],
        *,
        default: Sequence[str] | None = None,
        known: Mapping[str, type[Pass]] | None = None,
        plugins: Sequence[Plugin] = (),
    ) -> Pipeline:
        """Return the pipeline that ``text`` names.

        Args:
            text: Pass names, comma-separated, options in braces; ``default`` stands for the
                default passes and ``-name`` takes one of them away. In a sequence, each item is
                such a text, or a pass itself.
            default: Passes that ``default`` stands for; the built-in list if not given.
            known: Passes by name; the built-in ones and those of plugins if not given.
            plugins: Files, modules or classes that ``known`` is taken from where it is not given.

        Raises:
            UnknownNameError: no such pass, or no such option of it.
            UsageError: the text is not of this form.
            PluginError: a plugin cannot be used.
        """
        from llmopt.passes import DEFAULT

        table = passes_with(plugins) if known is None else known
        passes: list[Pass] = []
        for item in items_of(text):
            if isinstance(item, Pass):
                passes.append(item)
            elif item.startswith("-"):
                passes = _without(passes, item[1:], table)
            else:
                names = (DEFAULT if default is None else default) if item == "default" else [item]
                passes.extend(make(name, table) for name in names)
        return Pipeline(tuple(passes))

    @override
    def __str__(self) -> str:
        """Return the text that parses to this pipeline."""
        return ",".join(spell(item) for item in self.passes)

    def run(
        self, program: Program, after: Callable[[Pass, Program, Ran], None] | None = None
    ) -> Program:
        """Run every pass on ``program`` in place and return it.

        Args:
            program: The Program, which is edited.
            after: Called after each pass: printing, timing and verifying are its business.

        Raises:
            PassError: a pass left the Program outside the dialect, or one of others failed.
        """
        for item in self.passes:
            start = time.perf_counter()
            outcome = Outcome()
            for part in program.parts():
                found = self._step(item, part)
                outcome.hit(found.applied)
                outcome.missed += found.missed
                outcome.notes += found.notes
                program.absorb(part)
            spent_s = time.perf_counter() - start
            missed, notes = tuple(outcome.missed), tuple(outcome.notes)
            if after is not None:
                after(item, program, Ran(item.name, outcome.applied, missed, spent_s, notes))
        return program

    @staticmethod
    def _step(item: Pass, program: Program) -> Outcome:
        edge = _edge(program)
        outcome = run_guarded(item, program)
        modified = outcome.modified or not is_ours(type(item))  # others may not say what they did
        if modified:
            g.name_nodes(program.graph)
        if _edge(program) != edge and not item.changes_signature:
            raise invalid(item, "it changed the inputs or outputs")
        problems = dialect.verify(program.model) if modified and not item.lowers else []
        if problems:
            raise invalid(item, "; ".join(problems[:3]))
        return outcome


def items_of(text: str | Sequence[Item] | Pipeline) -> tuple[Item, ...]:
    """Return the items of a pipeline, of its text, or of a sequence of such texts and passes.

    >>> items_of("default, -merge-qkv, my-pass{limit=3,deep=true}")
    ('default', '-merge-qkv', 'my-pass{limit=3,deep=true}')
    """
    if isinstance(text, Pipeline):
        return text.passes
    if isinstance(text, str):
        return tuple(spelling.listed(text))
    parts = ((part,) if isinstance(part, Pass) else items_of(part) for part in text)
    return tuple(itertools.chain.from_iterable(parts))


def text_of(items: Sequence[Item]) -> str:
    """Return items as one text."""
    return ",".join(item if isinstance(item, str) else spell(item) for item in items)


def make(text: str, known: Mapping[str, type[Pass]]) -> Pass:
    """Return the pass that ``name{option=value,...}`` names."""
    name, options = spelling.split(text, "pass")
    if name not in known:
        hint = "`llmopt passes` describes each; --plugin adds yours"
        raise UnknownNameError("pass", name, known, hint)
    hint = f"`llmopt passes {name}` shows its options"
    return spelling.make(known[name], options, f"pass {name}", hint)


def _without(passes: list[Pass], name: str, known: Mapping[str, type[Pass]]) -> list[Pass]:
    if name not in known:
        raise UnknownNameError("pass", name, known, "only a pass that exists can be taken away")
    return [each for each in passes if each.name != name]


def _edge(program: Program) -> list[tuple[str | None, str]]:
    graph = program.graph
    return [(v.name, str(v.dtype)) for v in (*graph.inputs, *graph.outputs)]
