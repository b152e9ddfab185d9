"""What became of each attention in the engine, read from the table of its layers.

The builder tells the same table that the engine's inspector does, and it does so without a GPU: for
each layer a name, its kernel, and the ONNX nodes that it computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

_NAME: Final = re.compile(r"Name: (?P<name>.*?), LayerType: ")
_METADATA: Final = re.compile(r"Metadata: (?P<nodes>.*)\Z")
_NODE: Final = re.compile(r"\[ONNX Layer: (?P<node>[^\]\x1e]+)")
_FUSED: Final = re.compile(r"mha|fmha|flash", re.IGNORECASE)


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Args:
        name: Name of the layer, which tells its kernel.
        nodes: The ONNX nodes that it computes, or has a part in.
    """

    name: str
    nodes: frozenset[str]

    @property
    def is_attention(self) -> bool:
        """Whether it is one fused attention."""
        return _FUSED.search(self.name) is not None


@dataclass(frozen=True)
class AttentionFusion:
    """What became of one attention.

    Args:
        node: Name of the ONNX node.
        layers: The fused layers that compute it, one for each profile; none where it is not fused.
        reason: Reason why it is not one layer.
    """

    node: str
    layers: tuple[str, ...] = ()
    reason: str = ""

    @property
    def fused(self) -> bool:
        """Whether it is one layer."""
        return bool(self.layers)


def read_layers(lines: Iterable[str]) -> list[EngineLayer]:
    """Return the layers that the builder told.

    >>> line = "Name: _gemm_mha_v2_myl0_2, LayerType: kgen, Inputs: [], Metadata: [ONNX Layer: a]"
    >>> read_layers([line])[0].is_attention
    True
    """
    layers = []
    for line in lines:
        name, metadata = _NAME.search(line), _METADATA.search(line)
        if name is not None:
            nodes = _NODE.findall(metadata["nodes"]) if metadata is not None else []
            layers.append(EngineLayer(name["name"], frozenset(nodes)))
    return layers


def attentions(
    layers: Sequence[EngineLayer], nodes: Sequence[str], declined: Mapping[str, str], profiles: int
) -> list[AttentionFusion]:
    """Return what became of every attention of a network.

    Args:
        layers: Layers of the engine.
        nodes: The attentions of the network.
        declined: Attentions that were written out before the build, and why.
        profiles: Number of profiles of the engine: a fused attention has a layer in each.
    """
    found = []
    for node in nodes:
        fused = tuple(layer.name for layer in layers if layer.is_attention and node in layer.nodes)
        if len(fused) >= profiles:
            found.append(AttentionFusion(node, fused))
            continue
        other = [layer.name for layer in layers if node in layer.nodes]
        reason = f"TensorRT split it: {', '.join(other[:4]) or 'no layer names it'}"
        found.append(AttentionFusion(node, reason=reason))
    return found + [AttentionFusion(node, reason=why) for node, why in declined.items()]


def summary(
    capability: str, layers: Sequence[EngineLayer], found: Sequence[AttentionFusion]
) -> dict[str, Any]:
    """Return what ``engine-report.json`` says of one engine."""
    return {
        "capability": capability,
        "layers": len(layers),
        "attention": {
            "expected": len(found),
            "fused": sum(each.fused for each in found),
            "nodes": [
                {"node": each.node, "layers": list(each.layers)}
                | ({} if each.fused else {"reason": each.reason})
                for each in found
            ],
        },
        "names": [layer.name for layer in layers],
    }
