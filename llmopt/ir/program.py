"""Program: a model as llmopt sees it, its graphs and what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llmopt.interface.facts import ModelFacts, SourceRecord
from llmopt.interface.signature import Port, Role, Signature
from llmopt.ir import graph as g
from llmopt.ir import landmarks
from llmopt.ir.landmarks import Landmark


@dataclass(frozen=True)
class Facts:
    """What is known about a model beside its graph.

    Args:
        task: ``"generate"``, ``"text-to-text"``, ``"speech-to-text"``, ``"embed"``, ``"encode"``
            or ``"raw"``.
        model: Heads, widths, limits and special tokens.
        source: Record of the source.
        expected: Number of each fusible operator in the source, counted from its config or its
            module tree and never by a pass: ``{"attention": 30, "norm": 61, "rotary": 30}``.
        files: Tokenizer, chat and generation files to ship: name to content.
        activations: Mean squares of the activations that meet each column of a measured weight:
            name to [K] float32, > 0, of mean about 1.
    """

    task: str = "raw"
    model: ModelFacts = field(default_factory=ModelFacts)
    source: SourceRecord = field(default_factory=SourceRecord)
    expected: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    activations: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict, compare=False)

    @property
    def max_length(self) -> int:
        """The most tokens, past and new, that one sequence may have."""
        return self.model.max_length


class Program:
    """A model on its way from source to artifact: passes edit it in place.

    It has one component, ``model``, or several that run in their order, of which the last is the
    one that ``model``, ``graph`` and ``signature`` speak of.

    Args:
        model: The graph, standard ONNX operators of opset ``dialect.OPSET``.
        signature: Meaning of its inputs and outputs.
        facts: Further facts.
        name: Name of the component.
    """

    def __init__(
        self, model: ir.Model, signature: Signature, facts: Facts, name: str = "model"
    ) -> None:
        self.components: dict[str, ir.Model] = {name: model}
        self.signatures: dict[str, Signature] = {name: signature}
        self.facts = facts
        self.whole = self

    @classmethod
    def joined(cls, parts: Mapping[str, Program], facts: Facts) -> Program:
        """Return one Program of several components, the main one last."""
        *_, last = parts
        program = cls(parts[last].model, parts[last].signature, facts, last)
        program.components = {name: part.model for name, part in parts.items()}
        program.signatures = {name: part.signature for name, part in parts.items()}
        return program

    @property
    def main(self) -> str:
        """The name of the component that ``model``, ``graph`` and ``signature`` speak of."""
        return next(reversed(self.components))

    @property
    def model(self) -> ir.Model:
        """The main component."""
        return self.components[self.main]

    @property
    def graph(self) -> ir.Graph:
        """The graph of ``model``."""
        return self.model.graph

    @property
    def signature(self) -> Signature:
        """What the inputs and outputs of ``model`` mean."""
        return self.signatures[self.main]

    @signature.setter
    def signature(self, signature: Signature) -> None:
        self.signatures[self.main] = signature

    def parts(self) -> list[Program]:
        """Return each component as a Program of its own that shares the graph.

        The whole does not see what a part learns about itself until ``absorb``.
        """
        if len(self.components) == 1:
            return [self]
        made = []
        for name, model in self.components.items():
            part = Program(model, self.signatures[name], self.facts, name)
            part.whole = self
            made.append(part)
        return made

    def absorb(self, part: Program) -> None:
        """Take over what a part, edited by itself, has become."""
        self.components[part.main] = part.model
        self.signatures[part.main] = part.signature
        self.facts = part.facts

    def clone(self) -> Program:
        """Return a Program of its own that shares the unread weights."""
        copies = {
            name: Program(g.clone(model), self.signatures[name], self.facts, name)
            for name, model in self.components.items()
        }
        return Program.joined(copies, self.facts)

    def learn(self, **facts: Any) -> None:
        """Replace some facts."""
        self.facts = replace(self.facts, **facts)

    def input(self, role: Role | str, layer: int | None = None) -> ir.Value | None:
        """Return the graph input of ``role`` (and ``layer``), if there is one."""
        return _value(self.graph.inputs, self.signature.inputs, role, layer)

    def output(self, role: Role | str, layer: int | None = None) -> ir.Value | None:
        """Return the graph output of ``role`` (and ``layer``), if there is one."""
        return _value(self.graph.outputs, self.signature.outputs, role, layer)

    def landmark(self, landmark: Landmark) -> ir.Value | None:
        """Return the value of ``graph`` that is this landmark, if there is one."""
        return landmarks.find(self.graph, landmark)


def _value(
    values: Iterable[ir.Value], ports: Iterable[Port], role: Role | str, layer: int | None
) -> ir.Value | None:
    names = {p.name for p in ports if p.role == role and layer in (None, p.layer)}
    return next((value for value in values if value.name in names), None)
