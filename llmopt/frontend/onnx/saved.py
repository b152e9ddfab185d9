"""Programs saved as ONNX files with their signature and facts, read without conversion.

Other ONNX files are converted to the dialect. These are not changed: a pass does to the file what
it did to the saved Program.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import onnx_ir as ir

from llmopt.artifact.fields import Fields
from llmopt.artifact.signature import read_facts, read_signature
from llmopt.errors import ArtifactError, SourceError
from llmopt.frontend.base import Source
from llmopt.frontend.reference import Transform
from llmopt.interface.arrays import Arrays
from llmopt.interface.facts import SourceRecord
from llmopt.interface.signature import Role
from llmopt.ir import landmarks
from llmopt.ir.evaluator import Evaluator
from llmopt.ir.program import Facts, Program
from llmopt.ir.saving import save_with_data
from llmopt.ir.weights import Leaf

KEY: Final = "llmopt.program"
"""The entry of the model's metadata that holds the signature and the facts, as JSON."""
_PRESENTS: Final = (Role.PRESENT_KEY, Role.PRESENT_VALUE)


def save_program(program: Program, path: Path) -> None:
    """Write a Program to ``path``, its weights to a file next to it.

    Raises:
        OSError: The file cannot be written.
    """
    model = program.model.clone()
    metadata = {
        "signature": dataclasses.asdict(program.signature),
        "model": dataclasses.asdict(program.facts.model),
        "task": program.facts.task,
        "landmarks": landmarks.names(program.graph),
    }
    model.metadata_props[KEY] = json.dumps(metadata, sort_keys=True)
    save_with_data(model, path, f"{path.name}.data")


def open_saved(path: Path, model: ir.Model) -> Source:
    """Return the source of a model that ``save_program`` wrote: itself, run by the evaluator.

    Raises:
        SourceError: The metadata is damaged.
    """
    try:
        metadata = Fields(json.loads(model.metadata_props.pop(KEY)), path)
        signature = read_signature(metadata.child("signature"))
        facts = read_facts(metadata.child("model"))
        task = metadata.text("task")
        landmarks.restore(model.graph, metadata.mapping("landmarks"))
    except (ValueError, ArtifactError) as error:
        problem = f"the metadata {KEY!r} cannot be read ({error})"
        raise SourceError(path, problem, "write it again with `llmopt bisect`") from error
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.size > 1 and not value.is_graph_input():
            value.const_value = Leaf(name, tensor.numpy, tensor.dtype, tensor.shape.numpy())
    record = SourceRecord(path.stem, "onnx")
    program = Program(model, signature, Facts(task=task, model=facts, source=record))
    return Source(path.stem, program, SavedReference(program.clone()))


class SavedReference:
    """A saved Program, run by the evaluator; caches missing from a batch are empty.

    Args:
        program: Saved Program.
    """

    def __init__(self, program: Program) -> None:
        self._program = program

    def run(
        self, batches: Sequence[Arrays], transform: Transform | None = None
    ) -> Iterator[Arrays]:
        """Yield the outputs of each batch."""
        program = self._program if transform is None else self._changed(transform)
        evaluator = Evaluator(program.model)
        ports = program.signature.outputs
        names = [port.name for port in ports if port.role not in _PRESENTS]
        for batch in batches:
            yield evaluator.run({**self._empty(batch), **batch}, names)

    def _changed(self, transform: Transform) -> Program:
        """Return the Program with its weights transformed."""
        changed = self._program.clone()
        for name, value in changed.graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, Leaf):
                value.const_value = ir.tensor(transform(name, tensor.numpy()), tensor.dtype)
        return changed

    def _empty(self, batch: Arrays) -> Arrays:
        """Return empty caches for those that ``batch`` lacks."""
        rows = len(next(iter(batch.values()), ()))
        empty = self._program.signature.empty_caches(rows)
        return {name: array for name, array in empty.items() if name not in batch}
