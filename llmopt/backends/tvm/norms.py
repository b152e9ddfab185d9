"""Norms, embeddings and rotation without a cache: which kernels compute them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from llmopt.backends.tvm import linear, movement
from llmopt.backends.tvm.kernels import norms as kernels
from llmopt.backends.tvm.kernels.gather import gather as gather_kernel
from llmopt.backends.tvm.kernels.heads import Rotation
from llmopt.backends.tvm.kernels.rotary import rotary as rotary_kernel
from llmopt.backends.tvm.writing import dtype_of, shape_of
from llmopt.ir import graph as g

if TYPE_CHECKING:
    from llmopt.backends.tvm.function import Function


def norm(f: Function, node: ir.Node) -> Sequence[Any]:
    """Write a norm over the last axis."""
    x = f.tensor(node.inputs[0])
    *before, width = shape_of(x)
    layer = node.op_type == "LayerNormalization"
    shift = g.optional(node, 2)
    wanted = kernels.Norm(
        kind="layer" if layer else "rms",
        width=width,
        eps=g.attribute(node, "epsilon", 1e-5),
        bias=shift is not None,
        rows="one" if f.entry.one else "many",
    )
    operands = {"x": f.rows(x), "weight": f.tensor(node.inputs[1])}
    if shift is not None:
        operands["bias"] = f.tensor(shift)
    shape = (shape_of(operands["x"]), "float32")
    (y,) = f.call(f.module.cached(kernels.norm, wanted, f.features), operands, [shape])
    return [f.unrows(y, before)]


def gather(f: Function, node: ir.Node) -> Sequence[Any]:
    """Write a lookup of the rows of a table, or of anything else the plain way."""
    tensor = g.weight(node.inputs[0])
    table = tensor is not None and len(tensor.shape) == 2 and g.attribute(node, "axis", 0) == 0
    ids = f.tensor(node.inputs[1])
    if table and (stored := linear.tied(f, node)) is not None:
        return linear.looked_up(f, ids, *stored)
    x = f.tensor(node.inputs[0])
    if not table or dtype_of(x) != "float32" or dtype_of(ids) != "int64":
        return movement.RULES["Gather"](f, node)
    before, width = shape_of(ids), shape_of(x)[1]
    flat = f.flat(ids)
    kernel = f.module.cached(gather_kernel, width, f.features, "one" if f.entry.one else "many")
    shape = ([shape_of(flat)[0], width], "float32")
    (y,) = f.call(kernel, {"table": x, "ids": flat}, [shape])
    return [f.unrows(y, before)]


def rotary(f: Function, node: ir.Node) -> Sequence[Any]:
    """Write the rotation of the halves of each head by the angles of its position."""
    x = f.tensor(node.inputs[0])
    batch, tokens, width = shape_of(x)
    heads = g.attribute(node, "num_heads", 1)
    cos, sin, positions = (f.tensor(node.inputs[i]) for i in (1, 2, 3))
    rotation = Rotation(width // heads, 2 * shape_of(cos)[-1])
    operands = {"x": f.rows(x), "cos": cos, "sin": sin, "position_ids": positions}
    shape = (shape_of(operands["x"]), "float32")
    (y,) = f.call(f.module.cached(rotary_kernel, rotation, heads, f.features), operands, [shape])
    return [f.unrows(y, [batch, tokens])]
