"""Where tokens meet tokens: queries and keys, weights and values, written out or fused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.ir.attention import MASK, AttentionOp
from llmopt.passes.incremental.flow import (
    BATCH,
    KEYS,
    TOKENS,
    Axis,
    Flow,
    plain,
    refuse,
    sizes,
    special,
    untouched,
)
from llmopt.passes.incremental.reading import CachedAttention, DecoderReading, Site

_BATCH_LABELS: Final = "abcdefghij"


@dataclass(frozen=True)
class _Product:
    """A sum of products, as Einsum writes it.

    Args:
        node: The operator.
        labels: Labels of each operand, one letter an axis.
        out: The letters of what comes out.
    """

    node: ir.Node
    labels: tuple[str, str]
    out: str


def matmul(reading: DecoderReading, node: ir.Node) -> Flow:
    """Carry tokens through a product of matrices."""
    left, right = (len(sizes(node, g.operand(node, index))) for index in (0, 1))
    if min(left, right) < 2 or max(left, right) > len(_BATCH_LABELS):
        raise refuse(node, "multiplies vectors")
    batch = _BATCH_LABELS[: max(left, right) - 2]
    labels = (batch[len(batch) - left + 2 :] + "mk", batch[len(batch) - right + 2 :] + "kn")
    return _product(reading, _Product(node, labels, batch + "mn"))


def einsum(reading: DecoderReading, node: ir.Node) -> Flow:
    """Carry tokens through an Einsum of two operands."""
    equation = str(g.attribute(node, "equation", "")).replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    labels = inputs.split(",")
    distinct = all(len(set(text)) == len(text) for text in (*labels, out))
    if len(labels) != 2 or not arrow or "." in equation or not distinct:
        raise refuse(node, f"of {equation!r} is no product of two operands")
    return _product(reading, _Product(node, (labels[0], labels[1]), out))


def _product(reading: DecoderReading, of: _Product) -> Flow:
    moving = dict(reading.moving(of.node))
    axes = {i: dict(zip(of.labels[i], flow.axes, strict=True)) for i, flow in moving.items()}
    places = {i: _places(found) for i, found in axes.items()}
    if len(moving) == 2 and any(KEYS in found for found in places.values()):
        return _weighed(reading, of, moving, axes)
    flow = None
    if len(moving) == 2 and places[0][TOKENS] != places[1][TOKENS]:
        flow = _met(reading, of, axes, places)
    summed = {label for text in of.labels for label in text} - set(of.out)
    for found in axes.values():
        _check_sum(of.node, found, summed)
    if flow is not None:
        return flow
    merged = _merged(of, axes)
    layer = max(each.layer for each in moving.values())
    for index in {0, 1} - moving.keys():
        merged = _beside(reading, of, index, merged)
    return Flow(tuple(merged[label] for label in of.out), layer)


def _places(axes: Mapping[str, Axis]) -> dict[str, str]:
    """Return the label of each of batch, tokens and keys."""
    return {atom: label for label, axis in axes.items() for atom in special(axis)}


def _check_sum(node: ir.Node, axes: Mapping[str, Axis], summed: set[str]) -> None:
    for label in sorted(summed & axes.keys()):
        for atom in special(axes[label]):
            if atom == TOKENS:
                raise refuse(node, "sums over tokens, later ones too, and is no attention")
            untouched(node, Flow((axes[label],)), [0])


def _merged(of: _Product, axes: Mapping[int, Mapping[str, Axis]]) -> dict[str, Axis]:
    """Return the axis of each label, where two operands agree on it."""
    merged: dict[str, Axis] = {}
    for found in axes.values():
        for label, axis in found.items():
            known = merged.get(label, ())
            if known and axis and known != axis and (special(known) or special(axis)):
                raise refuse(of.node, f"aligns {known} with {axis}")
            merged[label] = known or axis
    return merged


def _beside(
    reading: DecoderReading, of: _Product, index: int, merged: dict[str, Axis]
) -> dict[str, Axis]:
    """Return the axes with those of an operand that does not depend on tokens."""
    dims = sizes(of.node, g.operand(of.node, index))
    labels = of.labels[index]
    varies = reading.proofs.varies(g.operand(of.node, index))
    beside = dict(merged)
    for label, dim in zip(labels, dims, strict=True):
        if label in merged:
            continue
        # a table of every position, met by queries: scores of positions
        beside[label] = (KEYS,) if varies and dim == "S" else plain(of.node, [dim])[0]
    reading.require_axes(of.node, index, [beside[label] for label in labels])
    return beside


def _met(
    reading: DecoderReading,
    of: _Product,
    axes: Mapping[int, Mapping[str, Axis]],
    positions: Mapping[int, Mapping[str, str]],
) -> Flow:
    """Return the scores of queries and keys: the operand whose tokens come last is the keys."""
    tokens = [positions[index][TOKENS] for index in (0, 1)]
    if any(label not in of.out for label in tokens):
        raise refuse(of.node, "sums over tokens, later ones too, and is no attention")
    index = 0 if of.out.endswith(tokens[0]) else 1
    if axes[index][tokens[index]] != (TOKENS,) or axes[1 - index][tokens[1 - index]] != (TOKENS,):
        raise refuse(of.node, "relates tokens that share their axis with something else")
    layer = reading.new_layer()
    depth = _only_sum(of)
    _add_site(reading, of, axes, (index, layer, "key", of.labels[index].index(depth)))
    other = {label: axis for label, axis in axes[index].items() if label != tokens[index]}
    merged = _merged(of, {0: axes[1 - index], 1: other | {tokens[index]: (KEYS,)}})
    return Flow(tuple(merged[label] for label in of.out), layer)


def _only_sum(of: _Product) -> str:
    """Return the label that queries and keys are summed over."""
    summed = [label for label in of.labels[0] if label in of.labels[1] and label not in of.out]
    if len(summed) != 1 or any(
        label not in of.out + summed[0] for text in of.labels for label in text
    ):
        raise refuse(of.node, "relates tokens to each other, and is no attention")
    return summed[0]


def _weighed(
    reading: DecoderReading,
    of: _Product,
    moving: Mapping[int, Flow],
    axes: Mapping[int, Mapping[str, Axis]],
) -> Flow:
    """Return the sum of values, weighed by attention."""
    index = 0 if moving[1].holds(KEYS) else 1
    weights, values = moving[1 - index], axes[index]
    summed = _only_sum(of)
    if (
        moving[index].holds(KEYS)
        or values[summed] != (TOKENS,)
        or axes[1 - index][summed] != (KEYS,)
    ):
        raise refuse(of.node, "multiplies scores otherwise than with values")
    if not (weights.weights and weights.causal):
        raise refuse(of.node, "sums over scores that no masked softmax made weights of")
    last = len(of.labels[index]) - 1
    depth = last if of.labels[index][last] != summed else last - 1
    _add_site(reading, of, axes, (index, weights.layer, "value", depth))
    kept = {label: axis for label, axis in values.items() if label != summed}
    merged = _merged(of, {0: {k: a for k, a in axes[1 - index].items() if k != summed}, 1: kept})
    return Flow(tuple(merged[label] for label in of.out))


def _add_site(
    reading: DecoderReading,
    of: _Product,
    axes: Mapping[int, Mapping[str, Axis]],
    site: tuple[int, int, str, int],
) -> None:
    index, layer, part, depth = site
    held = tuple(axes[index][label] for label in of.labels[index])
    atoms = [atom for axis in held for atom in axis if isinstance(atom, str)]
    if sorted(atoms) != sorted([BATCH, TOKENS]) or not held[depth] or special(held[depth]):
        raise refuse(of.node, f"has {part}s {held}, which are not [batch, heads, tokens, width]")
    reading.sites.append(Site(of.node, index, layer, part, held, depth))


def attention(reading: DecoderReading, node: ir.Node) -> Flow:
    """Carry tokens through Attention, whose keys and values get a past."""
    op = AttentionOp.of(node)
    for value, part in zip(op.qkv, "QKV", strict=True):
        flow = reading.flow(value)
        if flow is None or not _is_attended(flow.axes):
            held = None if flow is None else flow.axes
            raise refuse(node, f"has {part} {held}, not [batch, heads, tokens, width]")
    if any(v is not None for v in (op.past_key, op.past_value, op.nonpad_kv_seqlen)):
        raise refuse(node, "has a past or lengths of its own")
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        raise refuse(node, "gives more than its output to others")
    if not _is_masked(reading, node, op):
        raise refuse(node, "lets a token see later ones: nothing masks them")
    reading.fused.append(CachedAttention(node, reading.new_layer()))
    return Flow(_attended(node, reading.flows[op.q].axes))


def _is_attended(axes: Sequence[Axis]) -> bool:
    """Whether axes are [batch, heads, tokens, width] or [batch, tokens, heads * width]."""
    places = (0, 2) if len(axes) == 4 else (0, 1)
    others = [axis for at, axis in enumerate(axes) if at not in places]
    held = len(axes) in (3, 4) and axes[0] == (BATCH,) and axes[places[1]] == (TOKENS,)
    return held and not any(special(axis) for axis in others)


def _attended(node: ir.Node, axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Return the axes of what Attention gives: as wide as its values are."""
    width = plain(node, [sizes(node, node.outputs[0])[-1]])[0]
    return (*axes[:-1], width)


def _is_masked(reading: DecoderReading, node: ir.Node, op: AttentionOp) -> bool:
    """Whether no query sees a later key; what masks is shown to keep what it must."""
    causal, mask = op.causal or op.window[1] == 0, op.mask
    if mask is None:
        return causal
    if reading.flow(mask) is not None:
        raise refuse(node, f"has a mask {mask.name!r} that depends on the tokens")
    wide = mask.dtype != ir.DataType.BOOL
    beside: tuple[Axis, ...] = ((BATCH,), (), (TOKENS,), (KEYS,))
    axes = reading.require_axes(node, MASK, beside, shifts=wide)
    return causal or reading.proofs.forbids_later(node, mask, "add" if wide else "keep", axes)
