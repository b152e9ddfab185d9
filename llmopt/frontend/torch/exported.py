"""An exported program of PyTorch, from a file or converted, becomes a Program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from llmopt.errors import UnsupportedModelError
from llmopt.frontend.base import Source, SourceOptions
from llmopt.frontend.meaning import TracedModel, finish
from llmopt.frontend.reference import ModuleReference
from llmopt.frontend.tensors import reader
from llmopt.frontend.torch.outputs import output_names
from llmopt.frontend.torch.trace import translate
from llmopt.interface.facts import SourceRecord


@dataclass(frozen=True)
class Runnable:
    """A callable that computes what an exported program does.

    Args:
        call: Callable to run.
        positional: Number of inputs passed by position; the others are passed by name.
        names: Names of its inputs, in order; the exported program's by default.
    """

    call: Callable[..., Any]
    positional: int
    names: Sequence[str] = ()


def open_exported(
    exported: ExportedProgram, record: SourceRecord, options: SourceOptions, run: Runnable
) -> Source:
    """Return the Program and the reference of an exported program.

    Raises:
        UnsupportedModelError: An input or output is not a tensor, or an operator has no ONNX
            equivalent.
    """
    names = [str(name) for name in exported.graph_signature.user_inputs]
    placeholders = {
        n.name: n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"
    }
    odd = [name for name in names if not isinstance(placeholders.get(name), torch.Tensor)]
    if odd:
        raise UnsupportedModelError(
            record.name,
            [f"input {name!r} is not a tensor" for name in odd],
            "export it with tensors",
        )
    traced = translate(exported, reader(dict(exported.state_dict)))
    names = list(run.names or names)
    for value, name in zip(traced.model.graph.inputs, names, strict=True):
        value.name = name
    leaves = [torch.empty(0)] * exported.call_spec.out_spec.num_leaves
    result = torch.utils._pytree.tree_unflatten(leaves, exported.call_spec.out_spec)  # noqa: SLF001 - torch has no other
    traced_model = TracedModel(
        record=record,
        family=record.name,
        model=traced.model,
        outputs=output_names(result, record.name),
        expected=traced.expected,
        limit=traced.limit,
        reference=lambda out: ModuleReference(run.call, names, out, positional=run.positional),
    )
    return finish(traced_model, options)


def runnable(exported: ExportedProgram, name: str) -> Runnable:
    """Return the exported program as a module, without compiling the guards it carries.

    Raises:
        UnsupportedModelError: The inputs are nested.
    """
    spec = exported.call_spec.in_spec
    args, kwargs = spec.children()
    if any(not child.is_leaf() for child in (*args.children(), *kwargs.children())):
        raise UnsupportedModelError(name, ["an input is nested"], "export it with plain tensors")
    return Runnable(exported.module(check_guards=False), args.num_children)
