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

# Sizes to trace with: all different, so that no two dimensions are taken for one.
_B, _S, _P, _C, _I = 2, 5, 3, 7, 4
_DYNAMIC = torch.export.Dim.DYNAMIC
Dims = Sequence[int | str]


class _Part(nn.Module):
    """A piece of a model as a module of its own, with the whole's parameter names.

    Args:
        whole: The model that the piece is of.
        compute: The piece's function.
    """

    def __init__(self, whole: nn.Module, compute: Callable[..., Any]) -> None:
        super().__init__()
        for name, child in whole.named_children():
            self.add_module(name, child)
        for name, buffer in whole.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=False)
        self._compute = compute

    @override
    def forward(self, *tensors: Tensor) -> Any:
        """Return what the piece computes."""
        return self._compute(*tensors)


def trace_part(
    whole: nn.Module,
    compute: Callable[..., Any],
    inputs: Mapping[str, tuple[Dims, torch.dtype]],
    scope: str = "",
) -> ir.Graph:
    """Return the graph of a piece, its inputs and dimensions named.

    Args:
        whole: The model that the piece is of.
        compute: The piece's function.
        inputs: Dimensions and type of each input, by name.
        scope: The module of nodes that the whole model computes itself.
    """
    sizes = {"B": _B, "S": _S, "P": _P, "T": _S + _P, "K": _S, "C": _C, "I": _I}
    examples, dynamic = [], []
    for dims, dtype in inputs.values():
        shape = [sizes[d] if isinstance(d, str) else d for d in dims]
        examples.append(torch.ones(shape, dtype=dtype))
        dynamic.append({i: _DYNAMIC for i, d in enumerate(dims) if isinstance(d, str)})
    traced = trace_module(_Part(whole, compute), examples, (tuple(dynamic),), read=_unread)
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
    """Return a function that gives what lies in module ``old`` the name it has in ``new``."""

    def rename(name: str) -> str:
        return new + name[len(old) :] if name.startswith((f"{old}.", f"{old}/")) else name

    return rename
