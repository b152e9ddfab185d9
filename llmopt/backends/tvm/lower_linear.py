"""Lower products with weights to the operator that the kernels compute, epilogue included.

Rewrites::

    MatMul(x, W)                                        into    Linear(x, W)
    MatMul(x, Cast<float>(W'))                          into    Linear<bf16>(x, W')
    MatMul(x, Transpose(DequantizeLinear(codes)))       into    Linear<w4>(x, codes)
    Mul(MatMul(DequantizeLinear(QuantizeLinear(x / m)),
               DequantizeLinear(codes, scale)), m)      into    Linear<w8a8-dynamic>(x, codes)
    Gather(DequantizeLinear(codes), ids)                into    GatherRows<w4>(codes, ids)
    Gather(Cast<float>(E'), ids)                        into    GatherRows<bf16>(E', ids)

and what follows a product and reads nothing else of it: a bias, a Gelu, a gated feed-forward, the
residual.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import onnx_ir as ir
from typing_extensions import override

from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass
from llmopt.quantization.lazy import QuantizedPart, QuantizedWeight

DOMAIN: Final = "llmopt.tvm"
DYNAMIC: Final = "w8a8-dynamic"
BF16: Final = "bf16"


@dataclass(frozen=True)
class LowerLinear(Pass):
    """Lower products with weights, and lookups of rounded rows, to our kernels' operators.

    Numerics: exact; what the kernels round is theirs to say.
    Scope: MatMul with a matrix of weights. Leaves: products of two computed values.
    """

    name: ClassVar[str] = "lower-linear"
    lowers: ClassVar[bool] = True

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in g.nodes(program.graph, "Gather"):
            if _lower_rows(node):
                outcome.hit()
        for node in g.nodes(program.graph, "MatMul"):
            found = _product(node)
            if found is None:
                continue
            _emit(found)
            outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
            program.graph.sort()
        return outcome


@dataclass
class _MatchedLinear:
    """A product and what was found to follow it."""

    x: ir.Value
    weight: ir.Value
    scale: ir.Value | None
    scheme: str
    last: ir.Value
    rows: int
    name: str | None
    bias: ir.Value | None = None
    residual: ir.Value | None = None
    epilogue: list[str] = field(default_factory=list)


def _product(node: ir.Node) -> _MatchedLinear | None:
    """Return the product of ``node`` with a weight, if it is one, and what follows it."""
    found = _rounded(node) or _dynamic(node) or _narrow(node) or _plain(node)
    if found is None or (g.rank(found.x) or 0) < 2:
        return None
    _take_bias(found)
    _take_activation(found)
    _take_residual(found)
    return found


def _plain(node: ir.Node) -> _MatchedLinear | None:
    weight = g.weight(node.inputs[1])
    if weight is None or len(weight.shape) != 2 or weight.dtype != ir.DataType.FLOAT:
        return None
    rows = int(weight.shape.numpy()[1])
    x, w = g.operand(node, 0), g.operand(node, 1)
    return _MatchedLinear(x, w, None, "", node.outputs[0], rows, node.name)


def _rounded(node: ir.Node) -> _MatchedLinear | None:
    """Return a product with weights in blocks."""
    transpose = g.producer(node.inputs[1], "Transpose")
    codes = None if transpose is None else _codes(transpose.inputs[0])
    if codes is None:
        return None
    weight = quantized(codes)
    x, scheme = g.operand(node, 0), str(weight.scheme)
    return _MatchedLinear(x, codes, None, scheme, node.outputs[0], weight.rows, node.name)


def _narrow(node: ir.Node) -> _MatchedLinear | None:
    """Return a product with weights in bfloat16."""
    value = _stored(node.inputs[1])
    if value is None:
        return None
    rows = g.static(value, 1)
    assert rows is not None
    return _MatchedLinear(g.operand(node, 0), value, None, BF16, node.outputs[0], rows, node.name)


def _stored(value: ir.Value | None) -> ir.Value | None:
    """Return the matrix in bfloat16 that ``value`` is widened from, if `narrow-weights` made it."""
    cast = g.producer(value, "Cast")
    tensor = None if cast is None else g.weight(cast.inputs[0])
    if cast is None or tensor is None or tensor.dtype != ir.DataType.BFLOAT16:
        return None
    return g.operand(cast, 0) if len(tensor.shape) == 2 else None


def _dynamic(node: ir.Node) -> _MatchedLinear | None:
    """Return a product of codes whose rows were divided by their largest magnitude before."""
    x, w = (g.producer(node.inputs[i], "DequantizeLinear") for i in (0, 1))
    if x is None or w is None or g.rank(w.inputs[1]) != 1 or g.optional(w, 2) is not None:
        return None
    quantize = g.producer(x.inputs[0], "QuantizeLinear")
    divide = g.producer(quantize.inputs[0], "Div") if quantize is not None else None
    scaled = g.sole_user(node.outputs[0], "Mul")
    if divide is None or scaled is None or divide.inputs[1] not in scaled.inputs:
        return None
    codes, scale = g.operand(w, 0), g.operand(w, 1)
    rows = g.static(codes, 1)
    if rows is None or g.weight(codes) is None:
        return None
    source, end = g.operand(divide, 0), scaled.outputs[0]
    return _MatchedLinear(source, codes, scale, DYNAMIC, end, rows, node.name)


def _codes(value: ir.Value | None) -> ir.Value | None:
    """Return the codes that ``value`` is dequantized from, if `quantize-weights` made them."""
    cut = g.producer(value, "Slice")
    node = g.producer(value if cut is None else cut.inputs[0], "DequantizeLinear")
    if node is None or not isinstance(g.weight(node.inputs[0]), QuantizedPart):
        return None
    return g.operand(node, 0)


def quantized(codes: ir.Value) -> QuantizedWeight:
    """Return the weight that ``codes``, an operand of Linear or GatherRows, belong to."""
    part = codes.const_value
    assert isinstance(part, QuantizedPart)
    return part.of


def _take_bias(match: _MatchedLinear) -> None:
    add = g.sole_user(match.last, "Add")
    if add is None:
        return
    for value in add.inputs:
        if value is not None and g.weight(value) is not None and g.shape(value) == [match.rows]:
            match.bias, match.last = value, add.outputs[0]
            match.epilogue.append("bias")
            return


def _take_activation(match: _MatchedLinear) -> None:
    gelu = g.sole_user(match.last, "Gelu")
    if gelu is not None:
        by_tanh = g.attribute(gelu, "approximate", "none") == "tanh"
        match.epilogue.append("gelu_tanh" if by_tanh else "gelu")
        match.last = gelu.outputs[0]
        return
    gated = _gated(match)
    if gated is not None:
        match.epilogue.append("swiglu")
        match.last = gated


def _gated(match: _MatchedLinear) -> ir.Value | None:
    """Return Swish(gate) * up of a product's two halves, if that is all that reads them."""
    split = g.sole_user(match.last, "Split")
    if split is None or len(split.outputs) != 2 or match.rows % 2:
        return None
    gate, up = split.outputs
    if g.static(gate, -1) != match.rows // 2 or g.static(up, -1) != match.rows // 2:
        return None
    swish = g.sole_user(gate, "Swish")
    if swish is None or g.attribute(swish, "alpha", 1.0) != 1.0:
        return None
    product = g.sole_user(swish.outputs[0], "Mul")
    if product is None or up not in product.inputs or g.sole_user(up) is not product:
        return None
    return product.outputs[0]


def _take_residual(match: _MatchedLinear) -> None:
    add = g.sole_user(match.last, "Add")
    if add is None:
        return
    other = next((v for v in add.inputs if v is not match.last), None)
    sizes = g.shape(add.outputs[0])
    if other is None or sizes is None or g.shape(other) != sizes or g.shape(match.last) != sizes:
        return
    match.residual, match.last = other, add.outputs[0]
    match.epilogue.append("residual")


def _emit(match: _MatchedLinear) -> None:
    after = match.last.producer()
    assert after is not None
    attributes: dict[str, Any] = {
        "scheme": match.scheme,
        "rows": match.rows,
        "epilogue": ",".join(match.epilogue),
    }
    inputs = [match.x, match.weight, match.scale, match.bias, match.residual]
    build = g.Builder(after)
    out = build.op("Linear", inputs, attributes, domain=DOMAIN, name=match.name)
    g.replace(match.last, out)


def _lower_rows(node: ir.Node) -> bool:
    """Lower a lookup of rounded rows; return whether it is one."""
    codes, stored = _codes(node.inputs[0]), _stored(node.inputs[0])
    if codes is not None:
        weight = quantized(codes)
        attributes = {"scheme": str(weight.scheme), "columns": weight.columns}
    elif stored is not None and g.attribute(node, "axis", 0) == 0:
        attributes = {"scheme": BF16, "columns": g.static(stored, 1)}
    else:
        return False
    build = g.Builder(node)
    inputs = [codes or stored, node.inputs[1]]
    out = build.op("GatherRows", inputs, attributes, domain=DOMAIN, name=node.name)
    g.replace(node.outputs[0], out)
    return True
