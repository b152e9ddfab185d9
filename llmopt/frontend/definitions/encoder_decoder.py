"""An encoder-decoder model becomes a Program of two components.

``encoder`` returns its hidden states and the cross-attention keys and values of each layer of
``decoder``: they are computed once, however many tokens are generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from llmopt.frontend.definitions.assemble import Assembly
from llmopt.frontend.definitions.parts import Dims, renamer, trace_part
from llmopt.frontend.tensors import Read
from llmopt.interface.signature import Port, Role, Signature
from llmopt.ir import graph as g
from llmopt.ir.last_tokens import LOGITS_TO_KEEP, keep_last
from llmopt.ir.program import Facts, Program
from llmopt.models import Definition
from llmopt.models.config import EncoderDecoderConfig
from llmopt.models.encoder_decoder import EncoderDecoder

Inputs = dict[str, tuple[Dims, torch.dtype]]
ENCODER, DECODER = "encoder", "decoder"
_PARTS = ("key", "value")


def trace_encoder_decoder(
    definition: Definition, config: EncoderDecoderConfig, read: Read, facts: Facts
) -> Program:
    """Return the Program of a definition, its weights unread: one layer of each stack is traced."""
    module = definition.module(layers=[0])
    assert isinstance(module, EncoderDecoder)
    module.eval()
    parts = {
        ENCODER: _EncoderComponent(module, config).program(read, facts),
        DECODER: _DecoderComponent(module, config).program(read, facts),
    }
    return Program.joined(parts, facts)


class _EncoderComponent:
    """The encoder component.

    Args:
        module: Model with one layer of each stack.
        config: Config of the model.
    """

    def __init__(self, module: EncoderDecoder, config: EncoderDecoderConfig) -> None:
        self.module = module
        self.config = config
        self.length: int | str = config.max_source if config.bands else "S"

    def program(self, read: Read, facts: Facts) -> Program:
        """Return the component's Program."""
        assembly = Assembly(read)
        ports = list(self._ports())
        values = [assembly.input(p.name, _type(p.dtype), p.shape) for p in ports]
        hidden, *mask = assembly.add(self._prelude(ports), values)
        layer = self._layer(mask)
        for index in range(len(self.config.encoder.layers)):
            rename = renamer("encoder.layers.0", f"encoder.layers.{index}")
            (hidden,) = assembly.add(layer, [hidden, *mask], rename, f"encoder.layers.{index}.")
        (memory,) = assembly.add(self._finish(), [hidden])
        assembly.output(memory, "last_hidden_state")
        dims = ("B", self.length, self.config.hidden)
        outputs = [Port("last_hidden_state", Role.HIDDEN, "float32", dims)]
        cross_pair = self._cross_pair()
        for index, kind in enumerate(self.config.decoder.layers):
            rename = renamer("decoder.layers.0", f"decoder.layers.{index}")
            pair = assembly.add(cross_pair, [memory], rename, f"decoder.layers.{index}.")
            shape = ("B", kind.heads, self.length, kind.head_width)
            for part, value in zip(_PARTS, pair, strict=True):
                name = f"present.{index}.encoder.{part}"
                assembly.output(value, name)
                role = Role.SOURCE_KEY if part == "key" else Role.SOURCE_VALUE
                outputs.append(Port(name, role, "float32", shape, index))
        signature = Signature(tuple(ports), tuple(outputs))
        return Program(assembly.model(), signature, facts, ENCODER)

    def _ports(self) -> Sequence[Port]:
        if self.config.bands:
            shape = ("B", self.config.bands, 2 * self.config.max_source)
            return [Port("input_features", Role.FEATURES, "float32", shape)]
        return [
            Port("input_ids", Role.TOKENS, "int64", ("B", "S")),
            Port("attention_mask", Role.MASK, "int64", ("B", "S")),
        ]

    def _prelude(self, ports: Sequence[Port]) -> ir.Graph:
        module = self.module

        def compute(source: Tensor, *mask: Tensor) -> Any:
            return module.embed_source(source), *(module.source_context(each) for each in mask)

        inputs: Inputs = {p.name: (p.shape, _TORCH[p.dtype]) for p in ports}
        return trace_part(module, compute, inputs, scope="encoder.context")

    def _layer(self, mask: Sequence[ir.Value]) -> ir.Graph:
        layer = self.module.encoder.layers["0"]

        def compute(hidden: Tensor, *mask: Tensor) -> Any:
            return layer(hidden, mask[0] if mask else None)

        inputs = self._hidden()
        for value in mask:
            kind = torch.bool if value.dtype == ir.DataType.BOOL else torch.float32
            inputs["mask"] = (tuple(g.shape(value) or ()), kind)
        return trace_part(self.module, compute, inputs)

    def _finish(self) -> ir.Graph:
        stack = self.module.encoder

        def compute(hidden: Tensor) -> Any:
            return stack.finish(hidden).clone()  # an output must not be an input

        return trace_part(self.module, compute, self._hidden(), scope="encoder.norm")

    def _cross_pair(self) -> ir.Graph:
        module = self.module

        def compute(memory: Tensor) -> Any:
            return module.cross_pair(memory, "0")

        scope = "decoder.layers.0.cross_attention"
        return trace_part(module, compute, self._hidden(), scope=scope)

    def _hidden(self) -> Inputs:
        return {"hidden": (("B", self.length, self.config.hidden), torch.float32)}


class _DecoderComponent:
    """The decoder component.

    Args:
        module: Model with one layer of each stack.
        config: Config of the model.
    """

    def __init__(self, module: EncoderDecoder, config: EncoderDecoderConfig) -> None:
        self.module = module
        self.config = config
        self.length: int | str = config.max_source if config.bands else "C"

    def program(self, read: Read, facts: Facts) -> Program:
        """Return the component's Program."""
        assembly = Assembly(read)
        ports = list(self._ports())
        values = {p.name: assembly.input(p.name, _type(p.dtype), p.shape) for p in ports}
        tokens = ("input_ids", "attention_mask", "position_ids")
        seen = [values[p.name] for p in ports if p.role == Role.SOURCE_MASK]
        hidden, *masks = assembly.add(self._prelude(), [*(values[n] for n in tokens), *seen])
        layer = self._layer(masks[0])
        presents: list[tuple[Port, ir.Value]] = []
        for index in range(len(self.config.decoder.layers)):
            caches = [
                values[f"past_key_values.{index}.{side}.{part}"]
                for side in (DECODER, ENCODER)
                for part in _PARTS
            ]
            rename = renamer("decoder.layers.0", f"decoder.layers.{index}")
            inputs = [hidden, *masks, *caches]
            hidden, *pair = assembly.add(layer, inputs, rename, f"decoder.layers.{index}.")
            presents += zip(self._presents(index), pair, strict=True)
        hidden = keep_last(assembly.graph, hidden)
        ports.append(LOGITS_TO_KEEP)
        (logits,) = assembly.add(self._head(), [hidden])
        assembly.output(logits, "logits")
        logits.shape = ir.Shape(["B", "K", self.config.vocabulary])
        for port, value in presents:
            assembly.output(value, port.name)
        outputs = [Port("logits", Role.LOGITS, "float32", ("B", "K", self.config.vocabulary))]
        signature = Signature(tuple(ports), (*outputs, *(port for port, _ in presents)))
        return Program(assembly.model(), signature, facts, DECODER)

    def _ports(self) -> Sequence[Port]:
        ports = [
            Port("input_ids", Role.TOKENS, "int64", ("B", "S")),
            Port("attention_mask", Role.MASK, "int64", ("B", "T")),
            Port("position_ids", Role.POSITIONS, "int64", ("B", "S")),
        ]
        if not self.config.bands:
            ports.append(Port("encoder_attention_mask", Role.SOURCE_MASK, "int64", ("B", "C")))
        for index, kind in enumerate(self.config.decoder.layers):
            for side, length, roles in (
                (DECODER, "P", (Role.PAST_KEY, Role.PAST_VALUE)),
                (ENCODER, self.length, (Role.SOURCE_KEY, Role.SOURCE_VALUE)),
            ):
                shape = ("B", kind.heads, length, kind.head_width)
                for part, role in zip(_PARTS, roles, strict=True):
                    name = f"past_key_values.{index}.{side}.{part}"
                    ports.append(Port(name, role, "float32", shape, index))
        return ports

    def _presents(self, index: int) -> list[Port]:
        kind = self.config.decoder.layers[index]
        shape = ("B", kind.heads, "T", kind.head_width)
        roles = (Role.PRESENT_KEY, Role.PRESENT_VALUE)
        return [
            Port(f"present.{index}.decoder.{part}", role, "float32", shape, index)
            for part, role in zip(_PARTS, roles, strict=True)
        ]

    def _prelude(self) -> ir.Graph:
        module = self.module

        def compute(ids: Tensor, mask: Tensor, positions: Tensor, *source: Tensor) -> Any:
            seen = [each[:, None, None, :] != 0 for each in source]
            return module.embed(ids, positions), module.context(mask, ids.shape[1]), *seen

        inputs: Inputs = {
            p.name: (p.shape, _TORCH[p.dtype]) for p in self._ports() if p.layer is None
        }
        return trace_part(module, compute, inputs, scope="decoder.context")

    def _layer(self, mask: ir.Value) -> ir.Graph:
        layer, kind = self.module.decoder.layers["0"], self.config.decoder.layers[0]

        def compute(hidden: Tensor, mask: Tensor, *rest: Tensor) -> Any:
            *seen, past_key, past_value, key, value = rest
            pairs = (past_key, past_value), (key, value)
            out, present = layer(hidden, mask, *pairs, seen[0] if seen else None)
            return out, *present

        flat = torch.bool if mask.dtype == ir.DataType.BOOL else torch.float32
        inputs: Inputs = {
            "hidden": (("B", "S", self.config.hidden), torch.float32),
            "mask": (tuple(g.shape(mask) or ()), flat),
        }
        if not self.config.bands:
            inputs["seen"] = (("B", 1, 1, "C"), torch.bool)
        for name, length in (("past", "P"), ("memory", self.length)):
            for part in _PARTS:
                shape = ("B", kind.heads, length, kind.head_width)
                inputs[f"{name}_{part}"] = (shape, torch.float32)
        return trace_part(self.module, compute, inputs)

    def _head(self) -> ir.Graph:
        module = self.module

        def compute(hidden: Tensor) -> Tensor:
            return module.head(module.decoder.finish(hidden))

        inputs: Inputs = {"hidden": (("B", "K", self.config.hidden), torch.float32)}
        return trace_part(module, compute, inputs, scope="lm_head")


_TORCH = {"int64": torch.int64, "float32": torch.float32}


def _type(dtype: str) -> ir.DataType:
    return {"int64": ir.DataType.INT64, "float32": ir.DataType.FLOAT}[dtype]
