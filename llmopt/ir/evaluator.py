"""Run a model operator by operator, in numpy: the meaning of a Program, as ONNX states it.

This is onnx's reference evaluator, with the operators of `evaluator_ops` in place of its own. It
knows of no device, fuses nothing and chooses no kernel, so it is what everything else is compared
with; and it is slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import RuntimeContextError

from llmopt.errors import ArtifactError, LlmoptError
from llmopt.interface.arrays import Array
from llmopt.ir.evaluator_ops import CORRECTED

_FAILURES: Final = (
    *(ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AssertionError),
    *(AttributeError, ImportError),
)
"""What numpy raises, and onnx's evaluator in its name, where operands do not go together."""
_LONGEST: Final = 300
"""Characters of what the evaluator says: it may list every name that it knows."""
_DAMAGED: Final = (*_FAILURES, DecodeError, OSError)


class Evaluator:
    """A model that is ready to run.

    Weights stay where they are: mapped, if the model came from a file. What is computed of
    weights alone, as DequantizeLinear is, is computed once.

    Args:
        model: Standard operators. It is not changed.

    Raises:
        LlmoptError: An operator has no implementation.
    """

    def __init__(self, model: ir.Model) -> None:
        whole = _without_weights(model)
        self.types = {str(value.name): value.dtype for value in model.graph.inputs}
        self.outputs = [value.name for value in whole.graph.output]
        self._held = {
            name: value.const_value.numpy()
            for name, value in model.graph.initializers.items()
            if value.const_value is not None
        }
        early, late = _split(whole.graph.node, self._held.keys() - self.types.keys())
        self._settle(_with_nodes(whole, early), {name for node in late for name in _reads(node)})
        self._evaluator = _evaluator(_with_nodes(whole, late))

    def run(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Return outputs by name.

        Args:
            feeds: Inputs by name; those of initializers replace them.
            names: The outputs that are wanted; all if not given.

        Raises:
            LlmoptError: An input is missing, or the operands of a node do not go together.
        """
        wanted = list(names or self.outputs)
        missing = [name for name in self.types if name not in feeds and name not in self._held]
        if missing:
            raise LlmoptError(f"input {missing[0]!r} is missing")
        return _computed(self._evaluator, wanted, {**self._held, **feeds})

    def _settle(self, early: onnx.ModelProto, read: set[str]) -> None:
        """Compute what depends on weights alone, and hold of all what is still read."""
        kept = read.union(self.outputs, self.types)
        made = [name for node in early.graph.node for name in node.output if name and name in kept]
        if made:
            self._held |= _computed(_evaluator(early), made, self._held)
        self._held = {name: array for name, array in self._held.items() if name in kept}


def open_model(path: Path) -> Evaluator:
    """Return the model in a file, its weights mapped.

    Raises:
        ArtifactError: The file cannot be read.
    """
    try:
        return Evaluator(ir.load(path))
    except _DAMAGED as error:
        raise ArtifactError(path, f"it cannot be opened: {_first_line(error)}") from error


def lacking(model: ir.Model) -> list[str]:
    """Return every node that nothing here computes, in words."""
    known: dict[tuple[str, str], bool] = {}
    found = []
    for node in model.graph.all_nodes():
        kind = (node.domain, node.op_type)
        if kind not in known:
            known[kind] = _is_known(ir.serde.serialize_node(node))
        if not known[kind]:
            name = ".".join(filter(None, kind))
            found.append(f"onnx's evaluator has no {name} ({node.name!r})")
    return found


def _is_known(node: onnx.NodeProto) -> bool:
    try:
        ReferenceEvaluator(node, new_ops=list(CORRECTED))
    except NotImplementedError:
        return False
    except RuntimeContextError:  # a function, which one the types decide
        return True
    return True


def _evaluator(model: onnx.ModelProto) -> Any:
    try:
        return ReferenceEvaluator(model, new_ops=list(CORRECTED))
    except _FAILURES as error:
        raise LlmoptError(f"onnx's evaluator cannot run it: {_first_line(error)}") from error


def _computed(evaluator: Any, names: list[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    try:
        with np.errstate(all="ignore"):  # infinities are what masks are made of
            results = evaluator.run(names, feeds)
    except _FAILURES as error:
        reason = _first_line(error)
        raise LlmoptError(f"onnx's evaluator could not run the model: {reason}") from error
    return dict(zip(names, map(np.asarray, results), strict=True))


def _without_weights(model: ir.Model) -> onnx.ModelProto:
    """Return the model without what it holds, which is fed to it."""
    bare = model.clone()
    for graph in bare.graph.subgraphs():
        for value in graph.initializers.values():
            if value.const_value is not None:  # the evaluator reads no file
                value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    bare.graph.initializers.clear()
    return ir.to_proto(bare)


def _with_nodes(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """Return a copy of ``model`` with other nodes."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made


def _split(
    nodes: Sequence[onnx.NodeProto], known: set[str]
) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """Return the nodes that read nothing but what is known, and the others, in order."""
    early, late = [], []
    reached = known | {""}
    for node in nodes:
        if reached.issuperset(_reads(node)) and not _is_random(node):
            early.append(node)
            reached.update(node.output)
        else:
            late.append(node)
    return early, late


def _is_random(node: onnx.NodeProto) -> bool:
    return "Random" in node.op_type or node.op_type in ("Bernoulli", "Multinomial")


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the name of everything that a node reads, in the graphs inside it too."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _reads(inner)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:_LONGEST] or type(error).__name__
