"""Multiply once where several projections of the same input are multiplied apart.

Rewrites::

    q = MatMul(x, Wq)  [+ bq]
    k = MatMul(x, Wk)  [+ bk]    into    q, k, v = Split(MatMul(x, [Wq Wk Wv])  [+ [bq bk bv]])
    v = MatMul(x, Wv)  [+ bv]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.attention import AttentionOp
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass


@dataclass(frozen=True)
class Projection:
    """``MatMul(x, weight) [+ bias]``.

    Args:
        product: The MatMul.
        weight: Weight of the projection, [in, out].
        bias: [out], or None.
        result: Value that readers of the projection use.
    """

    product: ir.Node
    weight: ir.TensorProtocol
    bias: ir.TensorProtocol | None
    result: ir.Value


def projection(value: ir.Value) -> Projection | str:
    """Return the projection that computes ``value``, or why there is none."""
    bias, node = _bias(value)
    if isinstance(bias, str):
        return bias
    if node is None or not g.is_op(node, "MatMul"):
        return f"{value.name!r} is made by {node.op_type if node else 'an input'}, not by MatMul"
    weight = g.weight(node.inputs[1])
    if weight is None or len(weight.shape) != 2:
        return f"{node.name!r} does not multiply by a weight matrix"
    if bias is not None and g.sole_user(node.outputs[0]) is None:
        return f"{node.name!r} is read before its bias is added"
    if bias is not None and bias.shape[0] != weight.shape[1]:
        return f"the bias of {node.name!r} is not one number per output"
    return Projection(node, weight, bias, value)


def _bias(value: ir.Value) -> tuple[ir.TensorProtocol | str | None, ir.Node | None]:
    """Return what is added to ``value`` last, or why it is no bias, and the node before."""
    add = g.producer(value, "Add")
    if add is None:
        return None, value.producer()
    sides = [g.operand(add, 0), g.operand(add, 1)]
    for side, other in (sides, sides[::-1]):
        if g.rank(side) == 1 and (bias := g.weight(side)) is not None:
            return bias, other.producer()
    return f"{add.name!r} adds something other than a bias", None


def merge(parts: Sequence[Projection], name: str) -> str | None:
    """Replace ``parts`` by one product and a Split; return why not, if not."""
    first = parts[0]
    if len({part.product for part in parts}) != len(parts):
        return "two of the projections are the same"
    if any(part.product.inputs[0] is not first.product.inputs[0] for part in parts):
        return "the projections read different inputs"
    if len({part.weight.dtype for part in parts}) != 1:
        return "the weights differ in type"
    x = g.operand(first.product, 0)
    sizes = [_width(part) for part in parts]
    build = g.Builder(_earliest([part.product for part in parts]))
    tensor = weights.concatenated([part.weight for part in parts], 1)
    stem = f"{name}.weight"
    weight, row = build.initializer(stem, tensor), [*(g.shape(x) or [])[:-1], sum(sizes)]
    merged = build.op("MatMul", [x, weight], name=f"{name}/MatMul", like=first.result, shape=row)
    if any(part.bias is not None for part in parts):
        biases = [_zeros(part) if part.bias is None else part.bias for part in parts]
        bias = build.initializer(f"{name}.bias", weights.concatenated(biases, 0))
        merged = build.op("Add", [merged, bias], name=f"{name}/Add", like=merged)
    split = build.constant(sizes, "int64")
    pieces = build.ops("Split", [merged, split], {"axis": -1}, outputs=len(parts))
    for part, piece in zip(parts, pieces, strict=True):
        g.replace(part.result, piece)
    return None


def _zeros(part: Projection) -> ir.TensorProtocol:
    return ir.tensor(np.zeros(_width(part), part.weight.dtype.numpy()))


def _width(part: Projection) -> int:
    return part.weight.shape.numpy()[1]


def _earliest(nodes: Sequence[ir.Node]) -> ir.Node:
    graph = nodes[0].graph
    assert graph is not None
    return next(node for node in graph if node in nodes)


def _shared_prefix(parts: Sequence[Projection]) -> str:
    """Return the module path that the projections have in common."""
    paths = [str(part.product.name).split("/")[0].split(".")[:-1] for part in parts]
    common = [names[0] for names in zip(*paths, strict=False) if len(set(names)) == 1]
    return ".".join(common)


@dataclass(frozen=True)
class MergeQkv(Pass):
    """Merge the query, key and value projections of each self-attention.

    Numerics: exact; each output is the same sum of the same products.
    Scope: Attention whose Q, K and V are projections of one value, through rotary or not.
    Leaves: cross-attention, and projections that are normalized or reshaped first.
    """

    name: ClassVar[str] = "merge-qkv"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in g.nodes(program.graph, "Attention"):
            sources = [_origin(value) for value in AttentionOp.of(node).qkv]
            if all(g.producer(source, "Split") for source in sources):
                continue
            parts = [projection(source) for source in sources]
            reasons = [part for part in parts if isinstance(part, str)]
            found = [part for part in parts if isinstance(part, Projection)]
            prefix = _shared_prefix(found) if found else ""
            reason = reasons[0] if reasons else merge(found, f"{prefix}.qkv".lstrip("."))
            if reason:
                outcome.miss(node, reason)
            else:
                outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


def _origin(value: ir.Value) -> ir.Value:
    """Look past what is done to each head on its own: rotary, and norms between reshapes."""
    node = g.producer(value, "RotaryEmbedding", "Reshape", "RMSNormalization", "LayerNormalization")
    return value if node is None else _origin(g.operand(node, 0))


@dataclass(frozen=True)
class MergeGateUp(Pass):
    """Merge the gate and up projections of each gated feed-forward.

    Numerics: exact; each output is the same sum of the same products.
    Scope: ``Mul(act(x @ G), x @ U)`` with act one of Swish, Gelu, Relu, Sigmoid.
    Leaves: a gate that is no projection of the same input.
    """

    name: ClassVar[str] = "merge-gate-up"

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in g.nodes(program.graph, "Swish", "Gelu", "Relu", "Sigmoid"):
            product = g.sole_user(node.outputs[0], "Mul")
            if product is None:
                continue
            other = next((v for v in product.inputs if v is not node.outputs[0]), None)
            if other is None:
                continue
            gate, up = projection(g.operand(node, 0)), projection(other)
            if isinstance(gate, str) or isinstance(up, str):
                continue
            prefix = _shared_prefix([gate, up])
            reason = merge([gate, up], f"{prefix}.gate_up".lstrip("."))
            if reason:
                outcome.miss(node, reason)
            else:
                outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome
