"""Rewrite rules, one a file: the spellings of a formula, a check and a replacement.

A rule is a module of ``PATTERNS`` (``llmopt.ir.match``), ``check`` (every *Needs* of its
docstring; returns the reason for a refusal) and ``rewrite`` (returns the value that takes the
place of the matched one). ``apply`` runs rules as a pass and reports each refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.ir.match import Bound, Operator, Pattern, match
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome


@dataclass(frozen=True)
class Rule:
    """A formula and what takes its place.

    Args:
        patterns: The spellings of the formula, longest first.
        check: Returns why this match must be left alone, or None.
        rewrite: Builds the replacement in front of the matched node.
    """

    patterns: tuple[Pattern, ...]
    check: Callable[[Bound], str | None]
    rewrite: Callable[[g.Builder, Bound], ir.Value]


def apply(program: Program, rules: Sequence[Rule], kind: str = "") -> Outcome:
    """Apply each rule wherever it matches; ``kind`` is what a refusal counts as missing."""
    outcome = Outcome()
    for rule in rules:
        roots = {p.op_type for p in rule.patterns if isinstance(p, Operator)}
        for node in reversed(g.nodes(program.graph, *roots)):
            out = node.outputs[0]
            if node.graph is not None and (out.uses() or out.is_graph_output()):
                _try(rule, node, outcome, kind)
    if outcome.modified:
        g.remove_dead(program.model)
    return outcome


def _try(rule: Rule, node: ir.Node, outcome: Outcome, kind: str) -> None:
    for pattern in rule.patterns:
        bound = match(pattern, node.outputs[0])
        if bound is None:
            continue
        if (reason := rule.check(bound)) is not None:
            outcome.miss(node, reason, kind)
            return
        old = node.outputs[0]
        new = rule.rewrite(g.Builder(node), bound)
        new.shape, new.type = old.shape, old.type
        g.replace(old, new)
        outcome.hit()
        return
