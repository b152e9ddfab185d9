"""Mixtures of experts: feed-forwards of which a router chooses some for each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes.experts.every import every_expert, weighs_experts
from llmopt.passes.experts.gathered import gathered, gathered_experts
from llmopt.passes.experts.mixture import VIEWS, Experts, OtherFormError

__all__ = ["Experts", "find_experts", "routers"]

_BEFORE_CHOICE: Final = ("Softmax", "Sigmoid", "Add", "Cast")


def find_experts(program: Program) -> Iterator[tuple[ir.Node, Experts | str]]:
    """Yield each node that chooses experts, and the mixture or why it is another one."""
    for topk in g.nodes(program.graph, "TopK"):
        form = _form(topk)
        if form is not None:
            try:
                yield topk, form(topk)
            except OtherFormError as error:
                yield topk, str(error)


def routers(program: Program) -> set[ir.Node]:
    """Return the products that say which experts a token goes to."""
    found = set()
    for topk in g.nodes(program.graph, "TopK"):
        step: ir.Node | None = None if _form(topk) is None else topk
        while g.is_op(step, "TopK", *_BEFORE_CHOICE, *VIEWS):
            assert step is not None
            step = g.producer(step.inputs[0])
        if step is not None and g.is_op(step, "MatMul"):
            found.add(step)
    return found


def _form(topk: ir.Node) -> Callable[[ir.Node], Experts] | None:
    """Return what reads the mixture that ``topk`` chooses for; None if it chooses no experts."""
    if gathered(topk):
        return gathered_experts
    return every_expert if weighs_experts(topk) else None
