"""Products with weights, and rows looked up in them: which kernels compute them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from llmopt.backends.tvm.kernels.linear import selection as kernels
from llmopt.backends.tvm.kernels.rows import gather_packed
from llmopt.backends.tvm.lower_linear import BF16, DOMAIN, DYNAMIC, quantized
from llmopt.backends.tvm.weights import StoredArray
from llmopt.backends.tvm.writing import shape_of
from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.program import Program
from llmopt.quantization.dynamic import Columns
from llmopt.quantization.lazy import QuantizedWeight
from llmopt.quantization.schemes import Blockwise, Cast, DynamicInt8

if TYPE_CHECKING:
    from llmopt.backends.tvm.function import Function


def linear(f: Function, node: ir.Node) -> Sequence[Any]:
    """Write a product, its epilogue included."""
    x = f.tensor(node.inputs[0])
    *before, k = shape_of(x)
    wanted = _wanted(f, node, k)
    chosen = f.module.cached(kernels.choose, wanted)
    operands = _weight(f, node, chosen.packing)
    operands["x"] = f.rows(x)
    if g.optional(node, 3) is not None:
        operands["bias"] = f.tensor(node.inputs[3])
    if g.optional(node, 4) is not None:
        operands["residual"] = f.rows(f.tensor(node.inputs[4]))
    shape = ([shape_of(operands["x"])[0], wanted.columns], "float32")
    (kernel,) = chosen.kernels
    (y,) = f.call(kernel, operands, [shape])
    return [f.unrows(y, before)]


def _wanted(f: Function, node: ir.Node, k: int) -> kernels.Linear:
    steps = tuple(filter(None, g.attribute(node, "epilogue", "").split(",")))
    return kernels.Linear(
        n=g.attribute(node, "rows", 0),
        k=k,
        scheme=_scheme(node),
        rows="one" if f.entry.one else "many",
        epilogue=steps,
        features=f.features,
        exact=f.entry.exact,
    )


def _scheme(node: ir.Node) -> Any:
    text = g.attribute(node, "scheme", "")
    if text in {"", BF16}:
        return Cast("bfloat16") if text else None
    return DynamicInt8() if text == DYNAMIC else _kernel_scheme(quantized(g.operand(node, 1)))


def _kernel_scheme(weight: QuantizedWeight) -> Blockwise:
    """Return the scheme as far as kernels tell schemes apart."""
    return dataclasses.replace(weight.scheme, positive=False, scale="float32")


def _weight(f: Function, node: ir.Node, packing: kernels.Packing) -> dict[str, Any]:
    """Return the arrays of a weight by the kernels' names, stored once for each packing."""
    value = g.operand(node, 0 if node.op_type == "GatherRows" else 1)
    parts = {
        part: StoredArray(f"{value.name}.{part}", dtype, shape)
        for part, (shape, dtype) in packing.arrays.items()
    }
    read = _reader(node)
    return f.packed((packing, key_of(node)), parts, lambda: kernels.pack(read(), packing))


def key_of(node: ir.Node) -> Hashable:
    """Return what tells the weight of a Linear or GatherRows from others."""
    gathered = node.op_type == "GatherRows"
    value = g.operand(node, 0 if gathered else 1)
    tensor = g.weight(value)
    assert tensor is not None
    text = g.attribute(node, "scheme", "")
    if text in {"", BF16}:
        return weights.identity(tensor if gathered else weights.transposed(tensor))
    if text == DYNAMIC:
        return weights.identity(tensor)
    codes = quantized(value)
    return weights.identity(codes.base), codes.scheme


def _reader(node: ir.Node) -> Callable[[], kernels.Weight]:
    """Return what reads the weight of a Linear."""
    gathered = node.op_type == "GatherRows"
    value = g.operand(node, 0 if gathered else 1)
    tensor, text = g.weight(value), g.attribute(node, "scheme", "")
    assert tensor is not None
    if text in {"", BF16}:
        return (tensor if gathered else weights.transposed(tensor)).numpy
    if text == DYNAMIC:
        scale = g.weight(node.inputs[2])
        assert scale is not None
        return lambda: Columns(tensor.numpy(), scale.numpy())
    codes = quantized(value)
    return lambda: dataclasses.replace(codes.packed(), scheme=_kernel_scheme(codes))


def products(program: Program) -> dict[Hashable, ir.Node]:
    """Return a product that reads each weight as it is stored, by the weight's key."""
    found: dict[Hashable, ir.Node] = {}
    for node in g.nodes(program.graph, "Linear", domain=DOMAIN):
        if "swiglu" not in g.attribute(node, "epilogue", ""):  # gates lie between other rows
            found.setdefault(key_of(node), node)
    return found


def gather_rows(f: Function, node: ir.Node) -> Sequence[Any]:
    """Write a lookup of rows of a rounded table."""
    wanted = kernels.Linear(*_table(node), features=f.features)
    packing = f.module.cached(kernels.choose, wanted).packing
    like = f.module.products.get(key_of(node))
    return looked_up(f, f.tensor(node.inputs[1]), packing, like if like is not None else node)


def _table(node: ir.Node) -> tuple[int, int, Cast | Blockwise]:
    """Return the sizes and the scheme of what a GatherRows reads."""
    value = g.operand(node, 0)
    if g.attribute(node, "scheme", "") == BF16:
        rows, columns = g.static(value, 0), g.static(value, 1)
        assert rows is not None
        assert columns is not None
        return rows, columns, Cast("bfloat16")
    codes = quantized(value)
    return codes.rows, codes.columns, _kernel_scheme(codes)


def looked_up(f: Function, ids: Any, packing: kernels.Packing, of: ir.Node) -> Sequence[Any]:
    """Write a lookup of rows of a weight that is packed for products."""
    operands = _weight(f, of, packing)
    flat = operands["ids"] = f.flat(ids)
    shape = ([shape_of(flat)[0], packing.k], "float32")
    (y,) = f.call(f.module.cached(gather_packed, packing), operands, [shape])
    return [f.unrows(y, shape_of(ids))]


def tied(f: Function, node: ir.Node) -> tuple[kernels.Packing, ir.Node] | None:
    """Return how a product stores the table that a Gather reads, if one does."""
    tensor = g.weight(node.inputs[0])
    like = None if tensor is None else f.module.products.get(weights.identity(tensor))
    if like is None or tensor is None:
        return None
    rows, columns = (int(size) for size in tensor.shape.numpy())
    wanted = kernels.Linear(rows, columns, features=f.features)
    return f.module.cached(kernels.choose, wanted).packing, like
