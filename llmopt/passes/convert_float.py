"""Compute in a narrower float, and keep in float32 what would overflow or lose its meaning.

Rewrites::

    every float32 weight, value and cache    into    float16 or bfloat16
    x^2, e^x, sums, means, 1/sqrt(...)       into    Cast -> the same in float32 -> Cast

An *island* is what stays in float32: a square of 1000 is beyond float16, an epsilon of 1e-12 is 0
in it, and a position above 2048 has no float16. What an island computes stays float32 through
operators that read nothing else, and is rounded where it meets the rest again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from typing_extensions import override

from llmopt.errors import UnsupportedModelError, UsageError
from llmopt.interface.arrays import Array
from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.program import Program
from llmopt.ir.types import Formals, Types, element_types, standard
from llmopt.passes.base import Outcome
from llmopt.passes.rounding import Rounding, RoundingPass

WIDE: Final = ir.DataType.FLOAT
NARROW: Final = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
LEFT: Final = {"float16": 5e-3, "bfloat16": 2e-2}
"""What is left of the largest output where verification computes the converted graph in float32,
and the source with weights rounded likewise: rotary tables of 11 and 8 bits, 5e-4 and 4e-3
relative, in every layer; 9e-4 and 5e-3 on SmolLM2. What rounding activations costs is measured as
quality."""
_CACHES: Final = (Role.PAST_KEY, Role.PAST_VALUE, Role.PRESENT_KEY, Role.PRESENT_VALUE)

_SUMS: Final = frozenset(
    {
        *("Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Softmax", "LogSoftmax", "Softplus"),
        *("CumSum", "ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL1", "ReduceL2"),
        *("ReduceProd", "ReduceLogSum", "ReduceLogSumExp", "LpNormalization"),
    }
)
_NORMS: Final = frozenset(
    {
        *("RMSNormalization", "LayerNormalization", "GroupNormalization", "InstanceNormalization"),
        *("MeanVarianceNormalization", "BatchNormalization"),
    }
)
_RESIDUALS: Final = frozenset({"a sum of two values"})
ISLANDS: Final = {
    "none": frozenset[str](),
    "sums": _SUMS,
    "norms": _SUMS | _NORMS,
    "residuals": _SUMS | _RESIDUALS,
}
"""Operators that are computed in float32 wherever they stand, by the name of the option."""

_FOLLOWS: Final = frozenset(
    {
        *("Abs", "Add", "Clip", "Concat", "Cos", "Div", "Equal", "Erf", "Expand", "Floor"),
        *("Ceil", "Greater", "GreaterOrEqual", "Identity", "IsInf", "IsNaN", "Less"),
        *("LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Relu", "Reshape"),
        *("Round", "Sigmoid", "Sign", "Sin", "Slice", "Split", "Squeeze", "Sub", "Tanh"),
        *("Tile", "Transpose", "Unsqueeze", "Where"),
    }
)
"""Operators that stay in float32 where an operand is: elementwise ones, and moves of data."""
_PRODUCTS: Final = frozenset({"Einsum", "Gather", "MatMul"})
"""Operators that stay in float32 where all of their operands are: positions times frequencies."""


@dataclass(frozen=True)
class ConvertFloat(RoundingPass):
    """Let weights, activations and caches be of 16 bits, with islands of float32.

    Numerics: each value is rounded to 11 (float16) or 8 (bfloat16) bits; operators that ONNX
    defines to accumulate in float32 (norms with ``stash_type``, products on every kernel we know)
    still do.
    Scope: the graph. Inputs and outputs other than caches stay float32.
    Leaves: graphs with control flow, and operators that have no narrow form.
    Source: P. Micikevicius et al., Mixed Precision Training, 2018,
    https://arxiv.org/abs/1710.03740, section 3.

    Args:
        dtype: ``float16``, or ``bfloat16``, which has the range of float32.
        islands: Operators that stay in float32: ``sums`` (squares, exponentials, sums and means
            written out), ``norms`` (fused norms too), ``residuals`` (sums of two values, which grow
            from layer to layer, and the fused norms that read them), or ``none``, for experiments.
    """

    name: ClassVar[str] = "convert-float"
    changes_signature: ClassVar[bool] = True
    dtype: str = "float16"
    islands: str = "sums"

    def __post_init__(self) -> None:
        """Refuse what is no narrow float."""
        if self.dtype not in NARROW:
            raise UsageError(f"dtype={self.dtype}: choose float16 or bfloat16")
        if self.islands not in ISLANDS:
            raise UsageError(f"islands={self.islands}: choose one of {', '.join(ISLANDS)}")

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in program.graph:
            if any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
                outcome.miss(node, "control flow reads values of the graph around it as float32")
                return outcome
        _Conversion(program, self.dtype, ISLANDS[self.islands], outcome).run()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome

    @property
    @override
    def left(self) -> float:
        return LEFT[self.dtype]

    @override
    def rounding(self, program: Program, after: Rounding) -> Rounding:
        converted = program.clone()
        self.run(converted)
        dtype = NARROW[self.dtype]
        named = {
            leaf.source
            for value in converted.graph.initializers.values()
            if value.const_value is not None and value.dtype == dtype
            for leaf in weights.leaves(value.const_value)
        }

        def rounded(name: str, array: Array) -> Array:
            if name not in named:
                return after(name, array)
            return _rounded(array, dtype.numpy(), name).astype(np.float32)

        return rounded


@dataclass(frozen=True)
class _Home:
    """Where a value is computed.

    Args:
        wide: Value in float32.
        spreads: Operators that read it, and nothing narrow, stay in float32.
    """

    wide: bool = False
    spreads: bool = False


_HERE: Final = _Home()
_ISLAND: Final = _Home(wide=True, spreads=True)
_SHORE: Final = _Home(wide=True)


@dataclass
class _Conversion:
    """One Program on its way to another float.

    Args:
        program: Program to convert.
        dtype: The narrow type's name.
        islands: Operators that stay in float32.
        outcome: Outcome of the pass.
    """

    program: Program
    dtype: str
    islands: frozenset[str]
    outcome: Outcome
    homes: dict[ir.Value, _Home] = field(default_factory=dict)
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.narrow = NARROW[self.dtype]
        self.types: Types = element_types(self.program.graph)
        self.held = _constants(self.program.graph)

    def run(self) -> None:
        """Decide for every node, then rewrite."""
        graph = self.program.graph
        caches = {p.name for role in _CACHES for p in self._ports() if p.role == role}
        for value in graph.inputs:
            cached = value.name in caches
            self.homes[value] = _HERE if cached or value in self.held else _SHORE
        plan = [(node, self._home(node)) for node in graph]
        for value in graph.inputs:
            if value.name in caches and self.types.get(value) == WIDE:
                self._retype(value)
        for node, home in plan:
            if home is not None:
                self._convert(node, home)
        self._finish(caches)

    def _ports(self) -> Iterator[Any]:
        signature = self.program.signature
        yield from (*signature.inputs, *signature.outputs)

    def _home(self, node: ir.Node) -> _Home | None:
        """Decide where a node computes, None if it has nothing to do with float32."""
        read = [v for v in node.inputs if v is not None and self.types.get(v) == WIDE]
        made = [v for v in node.outputs if self.types.get(v) == WIDE]
        if not read and not made:
            return None
        home = self._decide(node, read)
        for value in made:
            self.homes[value] = home
        return home

    def _decide(self, node: ir.Node, read: list[ir.Value]) -> _Home:
        homes = [self.homes[value] for value in read if value not in self.held]
        spreading = [home.wide and home.spreads for home in homes]
        if node.op_type == "Cast":
            narrowed = self.types.get(g.operand(node, 0)) in NARROW.values()
            return _SHORE if read or narrowed else _ISLAND
        if not read:  # numbers out of integers, and fresh ones
            return _SHORE if node.op_type == "ConstantOfShape" else _ISLAND
        if node.op_type in self.islands or (self.islands and _is_square(node)):
            return _ISLAND
        if not self._has_narrow_form(node):
            return _SHORE
        if spreading and all(spreading) and node.op_type in _FOLLOWS | _PRODUCTS:
            return _ISLAND
        follows = any(spreading) and node.op_type in _FOLLOWS
        # wide, but what reads it is not: the products of a norm stay narrow
        return _SHORE if follows or self._is_residual(node, len(homes)) else _HERE

    def _is_residual(self, node: ir.Node, values: int) -> bool:
        """Whether a node adds two computed values or normalizes what they became."""
        adds = node.op_type == "Add" and values == 2
        return bool(self.islands & _RESIDUALS) and (adds or node.op_type in _NORMS)

    def _has_narrow_form(self, node: ir.Node) -> bool:
        formals = standard(node) or Formals((), ())
        names = {formals.input(i) for i, v in enumerate(node.inputs) if self._is_wide(v)}
        names |= {formals.output(i) for i, v in enumerate(node.outputs) if self._is_wide(v)}
        return any(formals.takes(name, self.narrow) for name in names if name)

    def _is_wide(self, value: ir.Value | None) -> bool:
        return value is not None and self.types.get(value) == WIDE

    def _convert(self, node: ir.Node, home: _Home) -> None:
        """Let a node read and give what its home says."""
        if node.op_type == "Cast":
            return
        want = WIDE if home.wide else self.narrow
        formals = standard(node) or Formals((), ())
        for index, value in enumerate(node.inputs):
            if self._is_wide(value) and value is not None:
                fixed = not formals.takes(formals.input(index), self.narrow)
                node.replace_input_with(index, self._as(value, WIDE if fixed else want, node))
        if home.wide:
            return
        for index, value in enumerate(node.outputs):
            if self._is_wide(value) and formals.takes(formals.output(index), self.narrow):
                self._retype(value)

    def _retype(self, value: ir.Value) -> None:
        value.type = ir.TensorType(self.narrow)
        self.outcome.hit()

    def _as(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        """Return ``value`` as ``dtype``, by a cast in front of ``reader`` where it is not."""
        resident = WIDE if value in self.held else (value.dtype or self.types[value])
        if resident == dtype:
            return value
        if (value, dtype) not in self.casts:
            made = self._constant(value, dtype) if value in self.held else None
            self.casts[value, dtype] = made or self._cast(value, dtype, reader)
        return self.casts[value, dtype]

    def _cast(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        out = g.Builder(reader).op("Cast", [value], {"to": int(dtype)}, like=value, dtype=dtype)
        self.outcome.hit()
        return out

    def _constant(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return an initializer with the numbers of ``value``, rounded when they are read."""
        tensor = narrowed(self.held[value], dtype)
        self.outcome.hit()
        return g.add_initializer(self.program.graph, f"{value.name}.{self.dtype}", tensor)

    def _finish(self, caches: set[str]) -> None:
        """Give outputs the types of the signature, and the signature those of the caches."""
        graph, program = self.program.graph, self.program
        for out in list(graph.outputs):
            if self.types.get(out) != WIDE:
                continue
            want = self.narrow if out.name in caches else WIDE
            if (out.dtype or WIDE) != want:
                build = g.Builder(graph)
                new = build.op(
                    "Cast", [out], {"to": int(want)}, name=f"{out.name}/Cast", like=out, dtype=want
                )
                g.replace_output(out, new)
                self.outcome.hit()
        signature = program.signature
        program.signature = replace(
            signature,
            inputs=tuple(map(self._port, signature.inputs)),
            outputs=tuple(map(self._port, signature.outputs)),
        )

    def _port(self, port: Any) -> Any:
        converted = port.role in _CACHES and port.dtype == "float32"
        return replace(port, dtype=self.dtype) if converted else port


def _is_square(node: ir.Node) -> bool:
    return node.op_type == "Mul" and node.inputs[0] is node.inputs[1]


def _constants(graph: ir.Graph) -> dict[ir.Value, ir.TensorProtocol]:
    """Return every value whose numbers are known, and their tensor."""
    found: dict[ir.Value, ir.TensorProtocol] = {}
    for value in graph.initializers.values():
        if value.const_value is not None and not value.is_graph_input():
            found[value] = value.const_value
    for node in g.nodes(graph, "Constant"):
        tensor = g.attribute(node, "value", None)
        if tensor is not None:
            found[node.outputs[0]] = tensor
    return found


def narrowed(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """Return ``tensor`` with its numbers rounded to ``dtype`` when they are read.

    A transposed weight stays a transposed weight, so that what is tied stays tied.

    Raises:
        UnsupportedModelError: when it is read: a weight of the source is beyond the type.
    """
    if weights.is_transpose(tensor):
        return weights.transposed(narrowed(weights.parts_of(tensor)[0], dtype))
    learned = next(weights.leaves(tensor), None)
    compute: Callable[..., Array] = (
        partial(saturated, dtype=dtype.numpy())
        if learned is None
        else partial(_rounded, dtype=dtype.numpy(), name=learned.source)
    )
    return weights.Derived("cast", [tensor], compute, dtype, list(tensor.shape.numpy()))


def saturated(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return a constant in ``dtype``; infinite stays infinite, what is too large finite.

    A finite number beyond the range masks something: half of the lowest number masks as well,
    and two of them can be added, where the sum of two infinities would make a row NaN.

    >>> saturated(np.array([-3e38, -np.inf, 0.1], np.float32), np.dtype(np.float16)).tolist()
    [-32752.0, -inf, 0.0999755859375]
    """
    most = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    beyond = np.isfinite(array) & (np.abs(array) > most)
    return np.where(beyond, np.sign(array) * (most / 2), array).astype(dtype)


def _rounded(array: Array, dtype: np.dtype[Any], name: str) -> Array:
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if not np.all(np.isfinite(result)) and np.all(np.isfinite(array)):
        largest = float(np.max(np.abs(array)))
        problem = f"weight {name!r} holds {largest:.6g}, beyond {dtype}"
        raise UnsupportedModelError("the model", [problem], "quantize to bf16, or leave it float32")
    return result
