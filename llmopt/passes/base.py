"""What a pass is: a frozen, named value that edits a Program in place and says what it did."""

from __future__ import annotations

import abc
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import ClassVar, Final

import onnx_ir as ir

from llmopt.ir.program import Program

ON_HIT: Final[ContextVar[Callable[[], None] | None]] = ContextVar("on_hit", default=None)
"""Called whenever a pass counts a change, inside ``hits.run_hits``: it may stop the pass there."""


@dataclass(frozen=True)
class Miss:
    """A place a pass looked at and left alone, and why.

    Args:
        node: The node's name.
        reason: Reason why the pass left the node alone.
        kind: Kind under which the fusion report counts the miss: ``"attention"``.
    """

    node: str
    reason: str
    kind: str = ""


@dataclass
class Outcome:
    """What a pass did; and what it did not do, and why.

    Args:
        applied: Number of changes made.
        missed: Every candidate it declined.
        notes: Findings, a sentence each; an analysis reports nothing else.
    """

    applied: int = 0
    missed: list[Miss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def modified(self) -> bool:
        """Whether the Program's text changed."""
        return self.applied > 0

    def hit(self, count: int = 1) -> None:
        """Count changes, once they are made."""
        self.applied += count
        if count and (told := ON_HIT.get()) is not None:
            told()

    def miss(self, node: ir.Node | str, reason: str, kind: str = "") -> None:
        """Record that ``node`` was left alone."""
        name = node if isinstance(node, str) else node.name or node.op_type
        self.missed.append(Miss(name, reason, kind))

    def note(self, text: str) -> None:
        """Record a finding for the user, in addition to the changes."""
        self.notes.append(text)


class Pass(abc.ABC):
    """An edit of the Program. Subclasses are frozen dataclasses; their fields are their options.

    A pass takes a valid Program to a valid Program, reports each change it made and each
    candidate it declined, changes nothing when it is run a second time, and keeps the names,
    order and types of inputs and outputs.

    Attributes:
        name: What pipelines call it.
        changes_signature: Whether it may change inputs and outputs.
        lowers: Whether it belongs to a backend and leaves the dialect for vendor operators.
    """

    name: ClassVar[str]
    changes_signature: ClassVar[bool] = False
    lowers: ClassVar[bool] = False

    @abc.abstractmethod
    def run(self, program: Program) -> Outcome:
        """Edit ``program`` in place and say what was done."""
