"""A transformers decoder with its KV cache becomes a Program: keys and values in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor, nn
from typing_extensions import override

from llmopt.errors import UnsupportedModelError
from llmopt.frontend.dims import name_dims
from llmopt.frontend.torch.trace import Traced, trace_module
from llmopt.interface.signature import Port, Role, Signature
from llmopt.ir import graph as g
from llmopt.ir.last_tokens import LOGITS_TO_KEEP, add_logits_to_keep, keep_last
from llmopt.ir.program import Facts, Program

# Sizes to trace with: all different, so that no two dimensions are taken for one.
SIZES: Final[Mapping[str, int]] = {"B": 2, "S": 5, "P": 3, "T": 8, "K": 4}
_DYNAMIC: Final = torch.export.Dim.DYNAMIC
_INPUTS: Final[Mapping[str, tuple[Role, tuple[str, str]]]] = {
    "input_ids": (Role.TOKENS, ("B", "S")),
    "attention_mask": (Role.MASK, ("B", "T")),
    "position_ids": (Role.POSITIONS, ("B", "S")),
}
_KEEP: Final = LOGITS_TO_KEEP.name
Dims = tuple[int | str, ...]


@dataclass(frozen=True)
class DecoderCache:
    """The shape of a decoder's KV cache.

    Args:
        shapes: Dimensions of each layer's keys, then values, layer by layer: ``("B", 2, "P", 16)``.
    """

    shapes: tuple[Dims, ...]

    @property
    def names(self) -> list[str]:
        """Names of the inputs."""
        return [f"past_key_values.{n // 2}.{_PARTS[n % 2]}" for n in range(len(self.shapes))]

    @property
    def presents(self) -> list[str]:
        """Names of the outputs."""
        return [f"present.{n // 2}.{_PARTS[n % 2]}" for n in range(len(self.shapes))]


_PARTS: Final = ("key", "value")


class Decoding(nn.Module):
    """A decoder that takes and returns its cache as tensors.

    Args:
        model: A causal language model of transformers.
        names: Inputs of the model, among ``_INPUTS``.
        keeps: Whether it has an argument ``logits_to_keep``.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, keeps: bool) -> None:
        super().__init__()
        self.model = model
        self._names = tuple(names)
        self._keeps = keeps

    @override
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return logits, and the keys and values of every layer."""
        from transformers import DynamicCache

        named = dict(zip(self._names, tensors, strict=False))
        rest = list(tensors[len(self._names) :])
        kept = {_KEEP: rest.pop(0)} if self._keeps else {}
        # without the config every layer keeps all tokens: the mask applies the window
        cache = DynamicCache(tuple(zip(rest[::2], rest[1::2], strict=True)))
        output = self.model(**named, **kept, past_key_values=cache, use_cache=True)
        presents = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return (output.logits, *presents)


def find_caches(model: nn.Module, inputs: Mapping[str, Tensor]) -> DecoderCache | str:
    """Return the KV cache of ``model``, or why it has none of keys and values alone."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    try:
        with torch.no_grad():
            output = model(**inputs, past_key_values=cache, use_cache=True)
    except Exception as error:  # noqa: BLE001 - a module may raise anything
        return f"it does not run with a KV cache: {type(error).__name__}: {error}"
    layers: list[Any] = cache.layers
    if getattr(output, "past_key_values", None) is not cache or not layers:
        return "it does not fill a KV cache"
    batch, tokens = inputs["input_ids"].shape
    shapes: list[Dims] = []
    for layer in layers:
        for tensor in (layer.keys, layer.values):
            if not isinstance(tensor, Tensor) or tensor.dim() != 4:
                return "a layer caches something other than keys and values"
            if (tensor.shape[0], tensor.shape[2]) != (batch, tokens):
                return f"a layer caches {list(tensor.shape)}, not [batch, heads, tokens, width]"
            shapes.append(("B", tensor.shape[1], "P", tensor.shape[3]))
    return DecoderCache(tuple(shapes))


def trace_cached(
    model: nn.Module, names: Sequence[str], caches: DecoderCache, *, keeps: bool
) -> tuple[Traced, Signature]:
    """Return the graph and the signature of a decoder with its cache.

    Args:
        model: A causal language model of transformers, in eval mode.
        names: Inputs of the model among ``input_ids``, ``attention_mask``, ``position_ids``.
        caches: KV cache of the model.
        keeps: Whether it has an argument ``logits_to_keep``.

    Raises:
        UnsupportedModelError: torch cannot export the model with its cache.
    """
    dims: dict[str, Dims] = {name: _INPUTS[name][1] for name in names}
    dims |= {_KEEP: ("K",)} if keeps else {}
    dims |= dict(zip(caches.names, caches.shapes, strict=True))
    examples = [_example(name, shape) for name, shape in dims.items()]
    dynamic = tuple(
        {axis: _DYNAMIC for axis, dim in enumerate(shape) if isinstance(dim, str)}
        for shape in dims.values()
    )
    wrapped = Decoding(model, names, keeps=keeps).eval()
    traced = trace_module(wrapped, examples, (dynamic,))
    graph = traced.model.graph
    if len(graph.inputs) != len(dims):
        raise UnsupportedModelError(
            type(model).__name__, ["an input is not read"], "trace it without its cache"
        )
    for value, name in zip(graph.inputs, dims, strict=True):
        value.name = name
    name_dims(graph, dims)
    return traced, _signature(graph, names, caches, keeps=keeps)


def _example(name: str, dims: Dims) -> Tensor:
    shape = [SIZES[dim] if isinstance(dim, str) else dim for dim in dims]
    if name == "position_ids":
        return torch.arange(SIZES["P"], SIZES["T"]).repeat(shape[0], 1)
    if name == _KEEP:
        return torch.arange(shape[0])
    integer = name in _INPUTS
    return torch.ones(shape, dtype=torch.int64 if integer else torch.float32)


def _signature(
    graph: ir.Graph, names: Sequence[str], caches: DecoderCache, *, keeps: bool
) -> Signature:
    ports = [Port(name, _INPUTS[name][0], "int64", _INPUTS[name][1]) for name in names]
    for number, (name, shape) in enumerate(zip(caches.names, caches.shapes, strict=True)):
        role = Role.PAST_VALUE if number % 2 else Role.PAST_KEY
        ports.append(Port(name, role, "float32", shape, number // 2))
    if keeps:
        _keep_tokens(graph)
    else:
        graph.outputs[0] = keep_last(graph, graph.outputs[0])
    ports.append(LOGITS_TO_KEEP)
    logits = graph.outputs[0]
    width = g.static(logits, -1) or 0
    logits.shape = ir.Shape(["B", "K", width])
    outputs = [Port("logits", Role.LOGITS, "float32", ("B", "K", width))]
    for number, (name, shape) in enumerate(zip(caches.presents, caches.shapes, strict=True)):
        role = Role.PRESENT_VALUE if number % 2 else Role.PRESENT_KEY
        dims = (shape[0], shape[1], "T", shape[3])
        graph.outputs[number + 1].shape = ir.Shape(dims)
        outputs.append(Port(name, role, "float32", dims, number // 2))
    for value, port in zip(graph.outputs, outputs, strict=True):
        value.name = port.name
    return Signature(tuple(ports), tuple(outputs))


def _keep_tokens(graph: ir.Graph) -> None:
    """Compute which tokens get logits: the last ``logits_to_keep`` ones, all for 0."""
    argument = next(value for value in graph.inputs if value.name == _KEEP)
    graph.inputs.remove(argument)
    argument.name = g.unused(graph, "kept")
    build = g.Builder(graph[0])
    tokens = next(value for value in graph.inputs if value.name == "input_ids")
    count = build.op("Squeeze", [build.op("Shape", [tokens], {"start": 1, "end": 2})])
    zero, one = build.constant(0, "int64"), build.constant(1, "int64")
    keep = add_logits_to_keep(graph)
    start = build.op(
        "Where", [build.op("Equal", [keep, zero]), zero, build.op("Sub", [count, keep])]
    )
    start = build.op("Max", [start, zero])
    kept = build.op(
        "Range",
        [start, count, one],
        name="logits_to_keep/Range",
        shape=["K"],
        dtype=ir.DataType.INT64,
    )
    ir.convenience.replace_all_uses_with(argument, kept)


def cached_program(traced: Traced, signature: Signature, facts: Facts) -> Program:
    """Return the Program of a decoder that was traced with its cache."""
    g.name_nodes(traced.model.graph)
    return Program(traced.model, signature, facts)


class FullPass(nn.Module):
    """A decoder that is called on whole sequences, as a reference.

    Args:
        model: A causal language model of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @override
    def forward(self, **tensors: Any) -> Tensor:
        """Return the logits of every token."""
        logits: Tensor = self.model(**tensors, use_cache=False).logits
        return logits
