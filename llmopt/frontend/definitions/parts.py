"""Parts of a definition's module, traced one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn
from typing_extensions import override

from llmopt.frontend.dims import name_dims
from llmopt.frontend.torch.trace import trace_module
from llmopt.ir import graph as g

# Sizes to trace with: all different, so that no two dimensions are mistaken for one.
_B, _S, _P, _C, _I = 2, 5, 3, 7, 4
_DYNAMIC = torch.export.Dim.DYNAMIC
Dims = Sequence[int | str]


class _Part(nn.Module):
    """A part of a model as a module of its own, with the model's parameter names.

    Args:
        model: Model that the part belongs to.
        compute: Function of the part.
    """

    def __init__(self, model: nn.Module, compute: Callable[..., Any]) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, buffer in model.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=False)
        self._compute = compute

    @override
    def forward(self, *tensors: Tensor) -> Any:
        """Return what the part computes."""
        return self._compute(*tensors)


def trace_part(
    model: nn.Module,
    compute: Callable[..., Any],
    inputs: Mapping[str, tuple[Dims, torch.dtype]],
    scope: str = "",
) -> ir.Graph:
    """Return the graph of a part, its inputs and dimensions named.

    Args:
        model: Model that the part belongs to.
        compute: Function of the part.
        inputs: Dimensions and type of each input, by name.
        scope: Module name for nodes that the model computes outside its submodules.
    """
    sizes = {"B": _B, "S": _S, "P": _P, "T": _S + _P, "K": _S, "C": _C, "I": _I}
    examples, dynamic = [], []
    for dims, dtype in inputs.values():
        shape = [sizes[d] if isinstance(d, str) else d for d in dims]
        examples.append(torch.ones(shape, dtype=dtype))
        dynamic.append({i: _DYNAMIC for i, d in enumerate(dims) if isinstance(d, str)})
    traced = trace_module(_Part(model, compute), examples, (tuple(dynamic),), read=_unread)
    graph = traced.model.graph
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    for node in graph if scope else ():
        if not g.scope_of(node):
            node.name = f"{scope}/{node.name}"
    name_dims(graph, {name: dims for name, (dims, _) in inputs.items()})
    return graph


def _unread(name: str) -> npt.NDArray[Any]:
    raise AssertionError(f"{name} was read while tracing")


def renamer(old: str, new: str) -> Callable[[str], str]:
    """Return a function that moves names in module ``old`` to module ``new``."""

    def rename(name: str) -> str:
        return new + name[len(old) :] if name.startswith((f"{old}.", f"{old}/")) else name

    return rename
