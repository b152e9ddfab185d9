"""The Attention of the dialect: its operands and attributes by name.

What an operand's number or an attribute's name is stands here alone; ``docs/dialect.md`` says what
they mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Self

import onnx_ir as ir

from llmopt.ir import graph as g

UNBOUNDED: Final = -1
"""The size of a window that has no end on this side."""
MASK: Final = 3
"""The number of the operand that is the mask, for replacing it."""
PRECISION: Final = "softmax_precision"
"""The attribute that holds a data type."""
_NAMES: Final = {
    "heads": ("q_num_heads",),
    "groups": ("kv_num_heads",),
    "scale": ("scale",),
    "causal": ("is_causal",),
    "window": ("left_window_size", "right_window_size"),
    "softcap": ("softcap",),
    "precision": (PRECISION,),
}


@dataclass(frozen=True, kw_only=True)
class AttentionAttributes:
    """What the attributes of an Attention say.

    Args:
        heads: H, of queries; 0 where Q has an axis of heads.
        groups: G, heads of keys and values; 0 where K has an axis of heads.
        scale: Factor of the scores; None for one over the root of a head's width.
        causal: Whether a query attends to no later key.
        window: Most keys before and after a query that it attends to; -1 for all of a side.
        softcap: Bound of the scores; 0 for none.
    """

    heads: int = 0
    groups: int = 0
    scale: float | None = None
    causal: bool = False
    window: tuple[int, int] = (UNBOUNDED, UNBOUNDED)
    softcap: float = 0.0

    @classmethod
    def of(cls, node: ir.Node) -> Self:
        """Return the attributes of an Attention, or of a backend's operator that has them."""
        return cls(**_read(node))

    @property
    def windowed(self) -> bool:
        """Whether a side of the window has an end."""
        return max(self.window) >= 0

    @property
    def placed(self) -> bool:
        """Whether it matters where a query stands among the keys."""
        return self.causal or self.windowed

    def scaling(self, width: int) -> float:
        """Return the factor of the scores of heads that are ``width`` wide."""
        return width**-0.5 if self.scale is None else self.scale

    def written(self) -> dict[str, Any]:
        """Return the attributes by their names, without those that say nothing."""
        return dict(self._written())

    def _written(self) -> Iterator[tuple[str, Any]]:
        if self.heads:
            yield "q_num_heads", self.heads
        if self.groups:
            yield "kv_num_heads", self.groups
        if self.scale is not None:
            yield "scale", self.scale
        if self.causal:
            yield "is_causal", 1
        yield from ((n, s) for n, s in zip(_NAMES["window"], self.window, strict=True) if s >= 0)
        if self.softcap:
            yield "softcap", self.softcap


@dataclass(frozen=True, kw_only=True)
class AttentionOp(AttentionAttributes):
    """An Attention as it is: it does not follow when the node is edited.

    Args:
        q: [B, S, H * D]; [B, H, S, D] before it is raised.
        k: [B, S, G * D]; [B, G, S, D] before it is raised.
        v: [B, S, G * E]; [B, G, S, E] before it is raised.
        mask: Boolean or added to the scores, broadcast to [B, H, S, T].
        past_key: [B, G, P, D].
        past_value: [B, G, P, E].
        nonpad_kv_seqlen: Keys of each row that are no padding, [B].
        y: Result, as Q with E in the place of D.
        presents: Keys and values of past and new tokens, if they are outputs.
        qk: Scores, if they are an output.
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    mask: ir.Value | None
    past_key: ir.Value | None
    past_value: ir.Value | None
    nonpad_kv_seqlen: ir.Value | None
    y: ir.Value
    presents: tuple[ir.Value, ir.Value] | None
    qk: ir.Value | None

    @classmethod
    def of(cls, node: ir.Node) -> Self:
        """Return the view of a standard Attention."""
        y, *more = node.outputs
        return cls(
            **_read(node),
            q=g.operand(node, 0),
            k=g.operand(node, 1),
            v=g.operand(node, 2),
            mask=g.optional(node, MASK),
            past_key=g.optional(node, 4),
            past_value=g.optional(node, 5),
            nonpad_kv_seqlen=g.optional(node, 6),
            y=y,
            presents=(more[0], more[1]) if len(more) > 1 else None,
            qk=more[2] if len(more) > 2 else None,
        )

    @property
    def qkv(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Queries, keys and values."""
        return self.q, self.k, self.v

    @property
    def past(self) -> tuple[ir.Value, ir.Value] | None:
        """Past keys and values, if there is a cache."""
        if self.past_key is None or self.past_value is None:
            return None
        return self.past_key, self.past_value


def kept(node: ir.Node, *fields: str) -> dict[str, Any]:
    """Return the attributes that ``node`` has for these fields, as they are written there."""
    names = {name for field in fields for name in _NAMES[field]}
    return {name: attr.value for name, attr in node.attributes.items() if name in names}


def _read(node: ir.Node) -> dict[str, Any]:
    left, right = (int(g.attribute(node, n, UNBOUNDED)) for n in _NAMES["window"])
    return {
        "heads": int(g.attribute(node, "q_num_heads", 0)),
        "groups": int(g.attribute(node, "kv_num_heads", 0)),
        "scale": g.attribute(node, "scale", None),
        "causal": bool(g.attribute(node, "is_causal", 0)),
        "window": (left, right),
        "softcap": float(g.attribute(node, "softcap", 0.0)),
    }
