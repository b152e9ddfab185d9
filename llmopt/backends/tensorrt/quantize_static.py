"""Quantize products to 8 bits with static, calibrated scales, as standard Q/DQ.

Rewrites::

    MatMul(x, W)    into    MatMul(DequantizeLinear(QuantizeLinear(x / c, s)),
                                   DequantizeLinear(codes of c W, t))

with one scale ``s`` for all of x, calibrated by running the Program, one ``t`` for each column of
W, and ``c`` [K] that smooths the channels of x (int8 alone: float8 has the range).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from typing_extensions import override

from llmopt.backends.tensorrt.legalize_operators import LegalizeOperators
from llmopt.errors import UsageError
from llmopt.interface.arrays import Array, Arrays
from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.feeds import Case, feeds
from llmopt.ir.program import Program
from llmopt.ir.saving import save_with_data
from llmopt.passes.base import Outcome
from llmopt.passes.quantize_weights import SHORTEST, candidates, leaf_turns
from llmopt.passes.rounding import Rounding, RoundingPass
from llmopt.quantization.calibration import Observer, loss, smoothing
from llmopt.quantization.schemes import Static

MOST_LOST: Final = 0.01
"""A product whose activation would lose more than this part of its square stays in float."""
_CASES: Final = 8  # batches of random tokens
_CODES: Final[Mapping[str, tuple[ir.DataType, type]]] = {
    "int8": (ir.DataType.INT8, np.int8),
    "float8": (ir.DataType.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
}


@dataclass(frozen=True)
class QuantizeStatic(RoundingPass):
    """Round weights and activations of projections to 8 bits, with calibrated scales.

    Numerics: each weight moves by at most half its column's scale (int8) or a sixteenth of itself
    (float8), each activation likewise, or to the end of the range where it exceeds what calibration
    saw; what that does to the outputs is measured, not bounded.
    Scope: MatMul of an activation with a matrix of weights.
    Leaves: the head that produces the logits, embeddings, and matrices with fewer than 16 inputs.

    Args:
        code: ``int8`` or ``float8`` (E4M3).
        percentile: Percentile of magnitudes that a scale covers; 100 is min-max.
        calibration: A text file, one text a line; random tokens if not given.
        smooth: Whether channels are smoothed before int8.
    """

    name: ClassVar[str] = "quantize-static"
    code: str = "int8"
    percentile: float = 100.0
    calibration: str = ""

    smooth: bool = True

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for group in self.groups(program, outcome):
            self._rewrite(group)
            outcome.hit(len(group.nodes))
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome

    @override
    def rounding(self, program: Program, after: Rounding) -> Rounding:
        known: dict[str, tuple[bool, Array]] = {}
        for group in self.groups(program, Outcome()):
            for node in group.nodes:
                base = weights.transposed(_tensor(node))
                turns = leaf_turns(base, transposed=False)
                known |= {name: (turned, group.even) for name, turned in turns}
        code = _CODES[self.code][1]

        def rounded(name: str, array: Array) -> Array:
            if name not in known:
                return after(name, array)
            turned, even = known[name]
            columns = np.ascontiguousarray(array if turned else array.T) * even[:, None]
            codes, scale = _codes(columns, self.limit, code), _scale(columns, self.limit)
            values = codes.astype(np.float32) * scale / even[:, None]
            return values if turned else values.T

        return rounded

    def groups(self, program: Program, outcome: Outcome) -> list[ProductGroup]:
        """Return the products to round, those of one activation together, calibrated."""
        readers: dict[ir.Value, list[ir.Node]] = {}
        head = program.output(Role.LOGITS)
        for node, _, base in list(candidates(program)):
            if not g.is_op(node, "MatMul"):
                continue
            if base.shape.numpy()[1] < SHORTEST or node.outputs[0] is head:
                outcome.miss(node, "it produces the logits, or its weight has too few columns")
                continue
            readers.setdefault(g.operand(node, 0), []).append(node)
        if not readers:
            return []
        observer = self._observed(program, [str(x.name) for x in readers])
        groups = [self._group(x, nodes, observer) for x, nodes in readers.items()]
        for group in groups:
            if group.lost > MOST_LOST:
                reason = f"rounding its activation to {self.code} loses {group.lost:.1%} of it"
                outcome.miss(group.nodes[0], reason)
        return [group for group in groups if group.lost <= MOST_LOST]

    @property
    def limit(self) -> float:
        """The largest magnitude of a code."""
        return Static("float8" if self.code == "float8" else "int8").limit

    def _group(self, x: ir.Value, nodes: list[ir.Node], observer: Observer) -> ProductGroup:
        ranges, rows = observer.ranges()[str(x.name)], observer.rows(str(x.name))
        even = np.ones_like(ranges)
        if self.smooth and self.code == "int8":
            even = smoothing(ranges, np.max([_rows(node) for node in nodes], axis=0))
        limit = float(np.max(ranges / even))
        step, code = limit / self.limit, _CODES[self.code][1]
        rounded = _rounded(rows / even / step, self.limit, code).astype(np.float32) * step * even
        return ProductGroup(x, nodes, even, limit, loss(rows, rounded))

    def _observed(self, program: Program, names: Sequence[str]) -> Observer:
        observer = Observer(self.percentile)
        with tempfile.TemporaryDirectory(prefix="llmopt-") as folder:
            run = _with_outputs(program, names, Path(folder))
            for batch in _batches(program, self.calibration):
                values = {**batch, **run(batch)}
                for name in names:
                    observer.add(name, values[name])
        return observer

    def _rewrite(self, group: ProductGroup) -> None:
        build = g.Builder(group.nodes[0])
        x = group.x
        if np.any(group.even != 1.0):
            x = build.op("Mul", [x, build.constant(1.0 / group.even, "float32")], like=group.x)
        rounded = self._activation(build, x, group.limit / self.limit)
        for node in group.nodes:
            node.replace_input_with(0, rounded)
            node.replace_input_with(1, self._weight(g.Builder(node), g.operand(node, 1), group))

    def _activation(self, build: g.Builder, x: ir.Value, step: float) -> ir.Value:
        dtype, code = _CODES[self.code]
        scale = build.constant(step, "float32")
        name = f"quantized_zero_{self.code}"
        zero = build.graph.initializers.get(name)
        if zero is None:
            zero = build.initializer(name, ir.tensor(np.zeros((), code), dtype))
        codes = build.op("QuantizeLinear", [x, scale, zero], like=x, dtype=dtype)
        return build.op("DequantizeLinear", [codes, scale, zero], like=x)

    def _weight(self, build: g.Builder, value: ir.Value, group: ProductGroup) -> ir.Value:
        tensor = g.weight(value)
        assert tensor is not None
        shape, limit = list(tensor.shape.numpy()), self.limit
        dtype, code = _CODES[self.code]
        op, even = f"{self.code}-columns", group.even[:, None]
        codes = weights.Derived(op, [tensor], lambda w: _codes(w * even, limit, code), dtype, shape)
        scale = weights.Derived(
            f"{op}-scale", [tensor], lambda w: _scale(w * even, limit), ir.DataType.FLOAT, shape[1:]
        )
        stem = str(value.name).removesuffix(".transpose")
        operands = [
            build.initializer(f"{stem}.codes", codes),
            build.initializer(f"{stem}.scale", scale),
        ]
        return build.op("DequantizeLinear", operands, {"axis": 1}, like=value)


@dataclass(frozen=True)
class ProductGroup:
    """The products of one activation.

    Args:
        x: The activation, [.., K].
        nodes: Each MatMul of it.
        even: Factors [K] that divide its channels and multiply the rows of the weights.
        limit: The largest magnitude of x after that.
        lost: Part of a token's square that rounding x loses.
    """

    x: ir.Value
    nodes: list[ir.Node]
    even: Array
    limit: float
    lost: float


def _tensor(node: ir.Node) -> ir.TensorProtocol:
    tensor = g.weight(node.inputs[1])
    assert tensor is not None
    return tensor


def _rows(node: ir.Node) -> Array:
    """Return the largest magnitude of each row of a weight [K, N]."""
    return np.asarray(np.abs(_tensor(node).numpy().astype(np.float32)).max(axis=1))


def _scale(weight: Array, limit: float) -> Array:
    """Return one scale for each column of [K, N], float32, > 0."""
    largest = np.abs(weight.astype(np.float32)).max(axis=0)
    return np.where(largest > 0, largest / limit, 1.0).astype(np.float32)


def _codes(weight: Array, limit: float, code: type) -> Array:
    """Return a weight [K, N] in codes, to the nearest, half to even."""
    return _rounded(weight.astype(np.float32) / _scale(weight, limit), limit, code)


def _rounded(numbers: Array, limit: float, code: type) -> Array:
    """Return numbers in units of their scale as codes."""
    kept = np.clip(numbers, -limit, limit)
    return np.asarray((np.rint(kept) if code is np.int8 else kept).astype(code))


def _with_outputs(program: Program, names: Sequence[str], folder: Path) -> Any:
    """Return a function that runs a Program and returns the values of these names too."""
    from llmopt.backends.onnxruntime.session import open_session

    watched = program.clone()
    LegalizeOperators().run(watched)  # to what onnxruntime has kernels for
    values = {str(out.name): out for node in watched.graph for out in node.outputs}
    outputs = {str(out.name) for out in watched.graph.outputs}
    for name in names:
        if name not in outputs and name in values:  # an input of the graph is known anyway
            watched.graph.outputs.append(values[name])
    save_with_data(watched.model, folder / "watched.onnx", "watched.data")
    return open_session(folder / "watched.onnx")


def _batches(program: Program, path: str) -> Iterator[Arrays]:
    limit = program.facts.max_length or 64
    vocabulary = program.facts.model.vocabulary or 2
    if not path:
        for seed in range(_CASES):
            case = Case(4, min(limit, 8 + 8 * seed), 0, "right", 100 + seed)
            yield feeds(program.signature, case, vocabulary)
        return
    for row in _texts(program, path):
        case = Case(1, len(row), 0, "none")
        batch = feeds(program.signature, case, vocabulary)
        for port in program.signature.inputs:
            if port.role == Role.TOKENS:
                batch[port.name] = np.asarray([row], port.dtype)
        yield batch


def _texts(program: Program, path: str) -> Iterator[list[int]]:
    """Yield the tokens of each line of a file.

    Raises:
        UsageError: It cannot be read, is empty, or the model has no tokenizer.
    """
    from tokenizers import Tokenizer

    content = program.facts.files.get("tokenizer.json")
    if content is None:
        raise UsageError(f"calibration={path}: the source has no tokenizer.json to encode it with")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"calibration={path}: cannot be read ({error})") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UsageError(f"calibration={path}: the file is empty; write one text per line")
    tokenizer = Tokenizer.from_str(json.dumps(json.loads(content)))
    limit = program.facts.max_length or 512
    yield from (tokenizer.encode(line).ids[:limit] for line in lines)
