"""Values of a graph that passes make once and look up again: the mask of padding, positions.

A landmark is kept with the value, not in its name: a model that was read may have any names. It
stays with a copy of the graph and is in no file but a saved Program.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, Final

import onnx_ir as ir

from llmopt.ir.graph import Builder

_KEY: Final = "llmopt.landmark"


class Landmark(enum.Enum):
    """What a value is to the passes. The text is the name of the node that makes it."""

    PADDING_MASK = "padding_mask"  # bool [B, 1, 1, T]: attention_mask, and nothing else
    POSITIONS = "positions"  # int64 [B, S], where the model takes none
    LAST_TOKENS = "logits_to_keep/Slice"  # [B, K, ...]: what logits are computed of
    TOTAL = "total"  # int64 [1]: T = P + S
    ROW_ORDER = "rows/turned"  # int64 [B, S]: where each token is, padding behind the others
    SLOTS = "slots"  # int64 [B, S]: where keys are cached, padding counted
    LAST_KEY = "last_key"  # int32 [B]
    TOTAL_KEYS = "total_keys"  # int32 []
    PADDING_BIAS = "padding_bias"  # float32 [B, 1, S, T]
    KEY_PADDING = "key_padding"  # int32 [B, T]


def mark(value: ir.Value, landmark: Landmark) -> ir.Value:
    """Let ``value`` be the landmark of its graph, and return it."""
    value.meta[_KEY] = landmark
    return value


def op(
    build: Builder,
    landmark: Landmark,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, Any] | None = None,
) -> ir.Value:
    """Add the node whose output is the landmark, of the landmark's name, and return the output."""
    return mark(build.op(op_type, inputs, attributes, name=landmark.value), landmark)


def is_landmark(value: ir.Value | None, landmark: Landmark) -> bool:
    """Whether ``value`` is this landmark."""
    return value is not None and value.meta.get(_KEY) is landmark


def find(graph: ir.Graph, landmark: Landmark) -> ir.Value | None:
    """Return the value that is this landmark, if there is one."""
    values = (value for node in graph for value in node.outputs)
    return next((value for value in values if is_landmark(value, landmark)), None)


def names(graph: ir.Graph) -> dict[str, str]:
    """Return the landmarks of ``graph`` and the values' names, to be saved."""
    found = ((landmark, find(graph, landmark)) for landmark in Landmark)
    return {landmark.value: str(value.name) for landmark, value in found if value is not None}


def restore(graph: ir.Graph, saved: Mapping[str, str]) -> None:
    """Mark the values that ``names`` returned when the graph was saved."""
    wanted = {name: Landmark(landmark) for landmark, name in saved.items()}
    for node in graph:
        for value in node.outputs:
            if (landmark := wanted.get(str(value.name))) is not None:
                mark(value, landmark)
