"""Whether each attention was fused in an engine, read from the table of its layers.

The builder lists the same table as the engine's inspector, without a GPU: for each layer a name,
its kernel, and the ONNX nodes that it computes.
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
        name: Name of the layer, which includes its kernel.
        nodes: ONNX nodes that it computes, fully or in part.
    """

    name: str
    nodes: frozenset[str]

    @property
    def is_attention(self) -> bool:
        """Whether it is one fused attention."""
        return _FUSED.search(self.name) is not None


@dataclass(frozen=True)
class AttentionFusion:
    """Whether one attention was fused.

    Args:
        node: Name of its ONNX node.
        layers: The fused layers that compute it, one for each profile; none where it is not fused.
        reason: Reason that it is not fused.
    """

    node: str
    layers: tuple[str, ...] = ()
    reason: str = ""

    @property
    def fused(self) -> bool:
        """Whether it is one layer."""
        return bool(self.layers)


def read_layers(lines: Iterable[str]) -> list[EngineLayer]:
    """Return the layers that the builder listed.

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
    """Return whether each attention of a network was fused.

    Args:
        layers: Layers of the engine.
        nodes: Attention nodes of the network.
        declined: Attentions that were written out before the build, and why.
        profiles: Number of optimization profiles: a fused attention has a layer in each.
    """
    fusions = []
    for node in nodes:
        fused = tuple(layer.name for layer in layers if layer.is_attention and node in layer.nodes)
        if len(fused) >= profiles:
            fusions.append(AttentionFusion(node, fused))
            continue
        other = [layer.name for layer in layers if node in layer.nodes]
        reason = f"TensorRT split it: {', '.join(other[:4]) or 'no layer names it'}"
        fusions.append(AttentionFusion(node, reason=reason))
    return fusions + [AttentionFusion(node, reason=why) for node, why in declined.items()]


def summary(
    capability: str, layers: Sequence[EngineLayer], fusions: Sequence[AttentionFusion]
) -> dict[str, Any]:
    """Return the entry of one engine in ``engine-report.json``."""
    return {
        "capability": capability,
        "layers": len(layers),
        "attention": {
            "expected": len(fusions),
            "fused": sum(each.fused for each in fusions),
            "nodes": [
                {"node": each.node, "layers": list(each.layers)}
                | ({} if each.fused else {"reason": each.reason})
                for each in fusions
            ],
        },
        "names": [layer.name for layer in layers],
    }
