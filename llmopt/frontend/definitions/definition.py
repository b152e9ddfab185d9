"""A definition from ``models/`` and a checkpoint become a Program.

One layer of each kind is traced; the others repeat it with their own weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from llmopt.frontend.base import Checkpoint
from llmopt.frontend.definitions.assemble import Assembly
from llmopt.frontend.definitions.encoder_decoder import trace_encoder_decoder
from llmopt.frontend.definitions.parts import Dims, renamer, trace_part
from llmopt.frontend.tensors import Read
from llmopt.interface.facts import ModelFacts
from llmopt.interface.signature import Port, Role, Signature
from llmopt.ir import graph as g
from llmopt.ir.last_tokens import LOGITS_TO_KEEP, keep_last
from llmopt.ir.program import Facts, Program
from llmopt.models import Definition
from llmopt.models.config import DecoderConfig, EncoderConfig, EncoderDecoderConfig
from llmopt.models.decoder import Context, Decoder
from llmopt.models.encoder import Encoder


def read_parameters(definition: Definition, checkpoint: Checkpoint) -> Read:
    """Return a function from a parameter's name in the definition to its float32 values."""
    recipes = definition.recipes()

    def read(name: str) -> npt.NDArray[Any]:
        return recipes[name].apply(checkpoint.read_float32)

    return read


def trace_definition(definition: Definition, read: Read, facts: Facts) -> Program:
    """Return the Program of a definition, its weights unread.

    Args:
        definition: The model.
        read: Function from a parameter's name to its values.
        facts: Facts of the checkpoint.
    """
    match definition.config:
        case DecoderConfig() as config:
            return trace_decoder(definition, config, read, facts)
        case EncoderDecoderConfig() as config:
            return trace_encoder_decoder(definition, config, read, facts)
        case config:
            return _encoder(definition, config, read, facts)


def decoder_facts(definition: Definition, config: DecoderConfig, **more: Any) -> ModelFacts:
    """Return the facts that a runner needs of a decoder."""
    kv_heads = config.layers[0].kv_heads
    return _facts(definition, config, config.layers, kv_heads=kv_heads, cache="concat", **more)


def encoder_facts(definition: Definition, config: EncoderConfig, **more: Any) -> ModelFacts:
    """Return the facts that a runner needs of an encoder."""
    return _facts(definition, config, config.layers, kv_heads=config.layers[0].heads, **more)


def encoder_decoder_facts(
    definition: Definition, config: EncoderDecoderConfig, **more: Any
) -> ModelFacts:
    """Return the facts that a runner needs of an encoder-decoder."""
    layers = config.decoder.layers
    more |= {"max_source": config.max_source, "source_vocabulary": config.source_vocabulary}
    return _facts(definition, config, layers, kv_heads=layers[0].heads, cache="concat", **more)


def _facts(definition: Definition, config: Any, layers: Sequence[Any], **more: Any) -> ModelFacts:
    """Return the facts that all models share; a runner needs no per-layer differences."""
    return ModelFacts(
        family=definition.family,
        layers=len(layers),
        heads=layers[0].heads,
        head_width=layers[0].head_width,
        hidden=config.hidden,
        vocabulary=config.vocabulary,
        **more,
    )


def trace_decoder(
    definition: Definition,
    config: DecoderConfig,
    read: Read,
    facts: Facts,
    *,
    embeds: bool = False,
) -> Program:
    """Return the Program of a decoder, its weights unread.

    Args:
        definition: The model.
        config: Config of the decoder.
        read: Function from a parameter's name to its values.
        facts: Facts of the checkpoint.
        embeds: Whether it takes embeddings because another component looks tokens up; the Program
            is then the component ``decoder``.
    """
    kinds = {kind: config.layers.index(kind) for kind in dict.fromkeys(config.layers)}
    module = definition.module(layers=list(kinds.values()))
    assert isinstance(module, Decoder)
    module.eval()
    assembly = Assembly(read)
    ports = [
        Port("inputs_embeds", Role.EMBEDS, "float32", ("B", "S", config.hidden))
        if embeds
        else Port("input_ids", Role.TOKENS, "int64", ("B", "S")),
        Port("attention_mask", Role.MASK, "int64", ("B", "T")),
        Port("position_ids", Role.POSITIONS, "int64", ("B", "S")),
    ]
    windows, ropes = _context_keys(module)
    tokens = [assembly.input(p.name, _TYPES[p.dtype][0], p.shape) for p in ports]
    hidden, *context = assembly.add(_prelude(module, ports), tokens)
    masks = dict(zip(windows, context, strict=False))
    rotary = {
        rope: (context[len(windows) + 2 * i], context[len(windows) + 2 * i + 1])
        for i, rope in enumerate(ropes)
    }
    graphs = {kind: _layer(module, index, config) for kind, index in kinds.items()}
    presents: list[tuple[str, ir.Value]] = []
    for index, kind in enumerate(config.layers):
        past = []
        for part in ("key", "value"):
            name = f"past_key_values.{index}.{part}"
            shape = ("B", kind.kv_heads, "P", kind.head_width)
            past.append(assembly.input(name, ir.DataType.FLOAT, shape))
            role = Role.PAST_KEY if part == "key" else Role.PAST_VALUE
            ports.append(Port(name, role, "float32", shape, index))
        shared = [masks[kind.window], *(rotary[kind.rope] if kind.rope else ())]
        old = f"layers.{kinds[kind]}"
        hidden, key, value = assembly.add(
            graphs[kind],
            [hidden, *shared, *past],
            renamer(old, f"layers.{index}"),
            prefix=f"layers.{index}.",
        )
        presents += [(f"present.{index}.key", key), (f"present.{index}.value", value)]
    hidden = keep_last(assembly.graph, hidden)
    ports.append(LOGITS_TO_KEEP)
    (logits,) = assembly.add(_head(module, config), [hidden])
    assembly.output(logits, "logits")
    logits.shape = ir.Shape(["B", "K", config.vocabulary])
    outputs = [Port("logits", Role.LOGITS, "float32", ("B", "K", config.vocabulary))]
    for name, present in presents:
        assembly.output(present, name)
        layer = int(name.split(".")[1])
        role = Role.PRESENT_KEY if name.endswith("key") else Role.PRESENT_VALUE
        kind = config.layers[layer]
        outputs.append(
            Port(name, role, "float32", ("B", kind.kv_heads, "T", kind.head_width), layer)
        )
    signature = Signature(tuple(ports), tuple(outputs))
    return Program(assembly.model(), signature, facts, "decoder" if embeds else "model")


_TYPES: Final = {
    "int64": (ir.DataType.INT64, torch.int64),
    "float32": (ir.DataType.FLOAT, torch.float32),
}


def _context_keys(module: Decoder) -> tuple[list[Any], list[Any]]:
    kinds = [module.config.layers[int(i)] for i in module.layers]
    windows = list(dict.fromkeys(kind.window for kind in kinds))
    ropes = list(dict.fromkeys(kind.rope for kind in kinds if kind.rope is not None))
    return windows, ropes


def _prelude(module: Decoder, ports: Sequence[Port]) -> ir.Graph:
    """Return the graph from tokens, or embeddings, to the inputs of the first layer."""
    windows, ropes = _context_keys(module)
    embeds = ports[0].role == Role.EMBEDS

    def compute(first: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
        context = module.context(attention_mask, position_ids, ())
        flat = [context.masks[window] for window in windows]
        for rope in ropes:
            flat.extend(context.rotary[rope])
        if embeds:  # an output must not be an input
            return module.begin(first, position_ids).clone(), *flat
        return module.embed(first, position_ids), *flat

    inputs: dict[str, tuple[Dims, torch.dtype]] = {
        port.name: (port.shape, _TYPES[port.dtype][1]) for port in ports
    }
    return trace_part(module, compute, inputs, scope="context")


def _layer(module: Decoder, index: int, config: DecoderConfig) -> ir.Graph:
    kind = config.layers[index]
    layer = module.layers[str(index)]

    def compute(hidden: Tensor, mask: Tensor, *rest: Tensor) -> Any:
        rotary = {kind.rope: (rest[0], rest[1])} if kind.rope is not None else {}
        context = Context({kind.window: mask}, rotary)
        out, present = layer(hidden, context, (rest[-2], rest[-1]))
        return out, *present

    real = torch.float32
    inputs: dict[str, tuple[Dims, torch.dtype]] = {
        "hidden": (("B", "S", config.hidden), real),
        "mask": (("B", 1, "S", "T"), torch.bool),
    }
    if kind.rope is not None:
        inputs["cos"] = (("B", "S", kind.rope.width), real)
        inputs["sin"] = (("B", "S", kind.rope.width), real)
    inputs["past_key"] = (("B", kind.kv_heads, "P", kind.head_width), real)
    inputs["past_value"] = (("B", kind.kv_heads, "P", kind.head_width), real)
    return trace_part(module, compute, inputs)


def _head(module: Decoder, config: DecoderConfig) -> ir.Graph:
    def compute(hidden: Tensor) -> Tensor:
        return module.head(module.finish(hidden))

    inputs: dict[str, tuple[Dims, torch.dtype]] = {
        "hidden": (("B", "K", config.hidden), torch.float32)
    }
    return trace_part(module, compute, inputs, scope="lm_head")


def _encoder(definition: Definition, config: EncoderConfig, read: Read, facts: Facts) -> Program:
    kinds = {kind: config.layers.index(kind) for kind in dict.fromkeys(config.layers)}
    module = definition.module(layers=list(kinds.values()))
    assert isinstance(module, Encoder)
    module.eval()
    assembly = Assembly(read)
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (config.token_types > 1)
    roles = {"input_ids": Role.TOKENS, "attention_mask": Role.MASK}
    values = {name: assembly.input(name, ir.DataType.INT64, ["B", "S"]) for name in names}
    ports = [Port(name, roles.get(name, Role.TOKEN_TYPES), "int64", ("B", "S")) for name in names]
    hidden, mask = assembly.add(_encoder_prelude(module, names), list(values.values()))
    graphs = {kind: _encoder_layer(module, index, mask) for kind, index in kinds.items()}
    for index, kind in enumerate(config.layers):
        rename = renamer(f"layers.{kinds[kind]}", f"layers.{index}")
        (hidden,) = assembly.add(graphs[kind], [hidden, mask], rename, prefix=f"layers.{index}.")
    outputs = [Port("last_hidden_state", Role.HIDDEN, "float32", ("B", "S", config.hidden))]
    if config.pooling is not None:
        (pooled,) = assembly.add(_pool(module, config), [hidden, values["attention_mask"]])
        assembly.output(hidden, "last_hidden_state")
        assembly.output(pooled, "sentence_embedding")
        outputs.append(Port("sentence_embedding", Role.EMBEDDING, "float32", ("B", config.hidden)))
    else:
        assembly.output(hidden, "last_hidden_state")
    return Program(assembly.model(), Signature(tuple(ports), tuple(outputs)), facts)


def _encoder_prelude(module: Encoder, names: Sequence[str]) -> ir.Graph:
    def compute(input_ids: Tensor, attention_mask: Tensor, *types: Tensor) -> Any:
        return module.embed(input_ids, *types), module.context(attention_mask)

    inputs: dict[str, tuple[Dims, torch.dtype]] = dict.fromkeys(names, (("B", "S"), torch.int64))
    return trace_part(module, compute, inputs, scope="context")


def _encoder_layer(module: Encoder, index: int, mask: ir.Value) -> ir.Graph:
    layer = module.layers[str(index)]

    def compute(hidden: Tensor, mask: Tensor) -> Any:
        return layer(hidden, mask)  # as a function: a module would be traced under another name

    dims: Dims = tuple(g.shape(mask) or ())
    dtype = torch.bool if mask.dtype == ir.DataType.BOOL else torch.float32
    inputs: dict[str, tuple[Dims, torch.dtype]] = {
        "hidden": (("B", "S", module.config.hidden), torch.float32),
        "mask": (dims, dtype),
    }
    return trace_part(module, compute, inputs)


def _pool(module: Encoder, config: EncoderConfig) -> ir.Graph:
    inputs: dict[str, tuple[Dims, torch.dtype]] = {
        "hidden": (("B", "S", config.hidden), torch.float32),
        "attention_mask": (("B", "S"), torch.int64),
    }
    return trace_part(module, module.pool, inputs, scope="pooling")
