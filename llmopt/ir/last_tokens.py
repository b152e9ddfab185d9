"""Logits of the last tokens alone: generation needs one row, and the product that makes it is dear.

``logits_to_keep`` says how many tokens get logits. It is an initializer that a caller may override:
1 by default, 0 for all.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

from llmopt.interface.signature import Port, Role
from llmopt.ir import graph as g
from llmopt.ir import landmarks
from llmopt.ir.landmarks import Landmark

LOGITS_TO_KEEP: Final = Port(Role.LOGITS_TO_KEEP, Role.LOGITS_TO_KEEP, "int64", ())
"""The port of ``logits_to_keep``."""


def add_logits_to_keep(graph: ir.Graph) -> ir.Value:
    """Add the overridable initializer to ``graph``, its last input, and return it."""
    keep = g.add_initializer(graph, LOGITS_TO_KEEP.name, ir.tensor(np.asarray(1, np.int64)))
    graph.inputs.append(keep)
    return keep


def keep_last(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Return ``value`` [B, S, ...] at the last ``logits_to_keep`` tokens, [B, K, ...]."""
    build = g.Builder(graph)
    keep = add_logits_to_keep(graph)
    start = build.op("Neg", [build.op("Reshape", [keep, build.constant([1], "int64")])])
    bounds = [build.constant([number], "int64") for number in (np.iinfo(np.int64).max, 1)]
    last = landmarks.op(build, Landmark.LAST_TOKENS, "Slice", [value, start, *bounds])
    sizes = g.shape(value) or []
    last.shape, last.type = ir.Shape(["B", "K", *sizes[2:]]), value.type
    return last
