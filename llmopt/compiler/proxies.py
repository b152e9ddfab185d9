"""What an artifact has to do, counted on its lowered Program: nothing is run and nothing timed.

The counts are the same in every build, so a gate can compare them exactly; and divided by the
time a run took they say how near to the machine's limits it was.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import onnx_ir as ir

from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.quantization.lazy import QuantizedPart

PRODUCTS: Final = frozenset(
    {
        *("MatMul", "Gemm", "FusedMatMul", "MatMulNBits"),
        *("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "Linear"),
    }
)
"""Operators that multiply rows by a matrix."""
ATTENTION: Final = frozenset(
    {
        *("Attention", "GroupQueryAttention", "MultiHeadAttention"),
        *("CachedAttention", "PackedAttention"),
    }
)
MIXTURES: Final = frozenset({"MoE", "QMoE"})
"""Operators that multiply a row by the weights of the experts that were chosen for it."""
_TURNING: Final = ATTENTION | {"RotaryEmbedding"}
_LOOKUPS: Final = frozenset({"Gather", "GatherBlockQuantized", "GatherRows"})
_VIEWS: Final = frozenset({"Cast", "DequantizeLinear", "Reshape", "Slice", "Transpose"})
"""What may stand between a stored weight and the operator that multiplies by it."""
_WITH_SCALES: Final = frozenset({"GatherRows", "Linear"})
"""What takes codes and scales of 16 bits as one operand."""
_INTEGER: Final = frozenset({"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"})


@dataclass
class WeightProducts:
    """Products with weights that are done equally often.

    Args:
        macs: Multiply-adds for one row, by what is multiplied: ``"int8"``, ``"float32"``.
        weight_bytes: Bytes of the weights as they are stored, scales included.
    """

    macs: Counter[str] = field(default_factory=Counter)
    weight_bytes: int = 0


@dataclass
class Work:
    """What one run of a Program has to do.

    Args:
        operators: The number of nodes of each operator, by the source's module that they came
            from.
        products: Products with weights: for each new token (``"token"``), for each token whose
            logits are wanted (``"kept"``), for each sequence (``"sequence"``).
        lookup_bytes: Bytes of table rows that a token looks up.
        other_bytes: Bytes of every other weight: norms, biases, constants.
        attention_macs: Multiply-adds for each pair of a new token and a token it may attend to.
        cache_bytes: Bytes of cached keys and values for one token.
    """

    operators: dict[str, Counter[str]] = field(default_factory=dict)
    products: dict[str, WeightProducts] = field(default_factory=dict)
    lookup_bytes: int = 0
    other_bytes: int = 0
    attention_macs: int = 0
    cache_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return it for the manifest."""
        return {
            "operators": {m: dict(sorted(c.items())) for m, c in sorted(self.operators.items())},
            "products": {
                often: {"macs": dict(sorted(p.macs.items())), "weight_bytes": p.weight_bytes}
                for often, p in sorted(self.products.items())
            },
            "lookup_bytes": self.lookup_bytes,
            "other_bytes": self.other_bytes,
            "attention_macs": self.attention_macs,
            "cache_bytes": self.cache_bytes,
        }


def work_of(program: Program) -> dict[str, Any]:
    """Return what one run of a lowered Program has to do, for the manifest.

    Further components are listed under their names.
    """
    *others, main = program.parts()
    further = {part.main: count_work(part).to_dict() for part in others}
    return count_work(main).to_dict() | further


def count_work(program: Program) -> Work:
    """Return what one run of a lowered Program has to do.

    Counted are multiply-adds of products and attention; element-wise operators are no more than
    a few operations for each number that they read.
    """
    work = Work(cache_bytes=_cache_bytes(program))
    kept = _behind(program.input(Role.LOGITS_TO_KEEP))
    counted: set[ir.Value] = set()
    for node in program.graph:
        work.operators.setdefault(g.scope_of(node), Counter())[node.op_type] += 1
        if node.op_type in PRODUCTS and _stored(g.optional(node, 1)):
            _count_product(work, node, is_kept=node in kept)
            counted |= set(_weights(node))
        elif node.op_type in MIXTURES:
            _count_experts(work, node)
            counted |= set(_weights(node))
        elif node.op_type in _LOOKUPS and _stored(g.optional(node, 0)):
            work.lookup_bytes += sum(_bytes(v, node) // _rows(v) for v in _weights(node))
            counted |= set(_weights(node))
        else:
            work.attention_macs += _attention_macs(node)
            tables = _tables(node)
            work.lookup_bytes += sum(_bytes(v) // _rows(v) for v in tables)
            counted |= set(tables)
    rest = [v for v in program.graph.initializers.values() if g.weight(v) is not None]
    work.other_bytes = sum(_bytes(value) for value in rest if value not in counted)
    return work


def _count_product(work: Work, node: ir.Node, *, is_kept: bool) -> None:
    often = "kept" if is_kept else "sequence" if _is_pooled(node) else "token"
    products = work.products.setdefault(often, WeightProducts())
    products.macs[_multiplied(node)] += _elements(node)
    products.weight_bytes += sum(_bytes(value, node) for value in _weights(node))


def _count_experts(work: Work, node: ir.Node) -> None:
    """Count the experts that one token goes to: those are read and multiplied by."""
    products = work.products.setdefault("token", WeightProducts())
    experts, width = g.static(node.inputs[1], -1) or 1, g.static(node.inputs[0], -1) or 0
    chosen = int(g.attribute(node, "k", 1))
    rows = g.static(node.inputs[2], 1) or 0  # of gates and what they gate; the other has half
    products.macs[_multiplied(node)] += chosen * (rows + rows // 2) * width
    products.weight_bytes += chosen * sum(_bytes(v, node) for v in _weights(node)) // experts


def _tables(node: ir.Node) -> list[ir.Value]:
    """Return the tables that an operator reads a row of for each token: sines and cosines."""
    if node.op_type not in _TURNING:
        return []
    return [v for v in node.inputs if g.weight(v) is not None and g.rank(v) == 2 and v is not None]


def _weights(node: ir.Node) -> Iterator[ir.Value]:
    """Yield every weight that a node reads, through what only turns or unpacks it."""
    for value in node.inputs:
        yield from _stored(value)


def _stored(value: ir.Value | None) -> list[ir.Value]:
    """Return the weights that ``value`` is a view of; none where it is computed."""
    if value is None:
        return []
    if g.weight(value) is not None:
        return [value]
    view = value.producer()
    if view is None or view.op_type not in _VIEWS:
        return []
    first = _stored(view.inputs[0])
    return first + [v for x in view.inputs[1:] for v in _stored(x)] if first else []


def _bytes(value: ir.Value, reader: ir.Node | None = None) -> int:
    """Return the bytes of a weight as it is stored."""
    tensor = value.const_value
    assert tensor is not None
    if not isinstance(tensor, QuantizedPart) or tensor.which != "codes":
        return int(tensor.nbytes)
    weight = tensor.of
    if reader is not None and reader.op_type in _WITH_SCALES:
        return weight.scheme.size_bytes(weight.rows, weight.columns, scale_bytes=2)
    return weight.rows * weight.scheme.padded(weight.columns) * weight.scheme.bits // 8


def _rows(value: ir.Value) -> int:
    tensor = value.const_value
    assert tensor is not None
    return max(int(tensor.shape.numpy()[0]), 1) if len(tensor.shape) else 1


def _elements(node: ir.Node) -> int:
    """Return how many numbers the matrix has that a product multiplies by."""
    if node.op_type == "MatMulNBits":
        return int(g.attribute(node, "N", 0) * g.attribute(node, "K", 0))
    if node.op_type == "Linear":
        return int(g.attribute(node, "rows", 0)) * (g.static(node.inputs[0], -1) or 0)
    return math.prod(size for size in g.shape(node.inputs[1]) or [] if isinstance(size, int))


def _multiplied(node: ir.Node) -> str:
    """Return the type of the numbers that a product multiplies."""
    if node.op_type in _INTEGER or (node.op_type == "Linear" and g.attribute(node, "scheme", "")):
        return "int8"
    by_codes = node.op_type in {"MatMulNBits", "QMoE"}
    if by_codes and g.attribute(node, "accuracy_level", 0) == 4:
        return "int8"
    both = [g.producer(node.inputs[i], "DequantizeLinear") for i in (0, 1)]
    codes = both[0].inputs[0] if both[0] is not None and both[1] is not None else node.inputs[0]
    dtype = None if codes is None else codes.dtype
    return "float32" if dtype is None else str(dtype.numpy().name)


def _is_pooled(node: ir.Node) -> bool:
    """Whether a product takes one row for each sequence instead of one for each token."""
    sizes = g.shape(node.inputs[0])
    return sizes is not None and len(sizes) == 2 and "S" not in str(sizes[0])


def _attention_macs(node: ir.Node) -> int:
    """Return multiply-adds for a pair of tokens: of the scores, and of the values' sum."""
    if node.op_type in ATTENTION:
        width = g.static(node.outputs[0], -1)
        return 2 * width if width is not None else 0
    if node.op_type != "MatMul" or g.rank(node.outputs[0]) != 4:
        return 0
    # Attention that was not fused: [B, H, S, D] by [B, H, D, T], and [B, H, S, T] by [B, H, T, D].
    heads = g.static(node.outputs[0], 1) or 1
    return heads * (g.static(node.inputs[0], -1) or g.static(node.outputs[0], -1) or 0)


def _cache_bytes(program: Program) -> int:
    """Return the bytes of all keys and values of one token."""
    total = 0
    for port in program.signature.pasts:
        width = 2 if port.dtype in {"float16", "bfloat16"} else 1 if "8" in port.dtype else 4
        total += width * math.prod(size for size in port.shape if isinstance(size, int))
    return total


def _behind(start: ir.Value | None) -> set[ir.Node]:
    """Return every node whose result depends on ``start``."""
    dependents: set[ir.Node] = set()
    open_ = [] if start is None else g.users(start)
    while open_:
        node = open_.pop()
        if node not in dependents:
            dependents.add(node)
            open_ += [user for output in node.outputs for user in g.users(output)]
    return dependents
